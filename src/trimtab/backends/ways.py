"""The ways in which a small model may have read a context, weighed by its own probabilities."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from trimtab.align.covers import Cover
from trimtab.align.cut import HostCut, Left
from trimtab.align.replies import Reply
from trimtab.align.strings import Strings
from trimtab.backends.token_tree import TokenTree

MIN_SHARE = 5e-3
"""Covers that are less likely than this are passed over."""


@dataclass(frozen=True)
class Ways:
    """The covers of one context, with the steps in which they differ.

    Attributes:
        covers: The ways.
        ends: Node of each way's last token.
        paths: For each way, the steps that not all ways share: node, and token after it.
        cut: What the host's last token says, if anything.
    """

    covers: Sequence[Cover]
    ends: Sequence[int]
    paths: Sequence[Sequence[tuple[int, int]]]
    cut: HostCut | None

    @staticmethod
    def of(
        tree: TokenTree, covers: Sequence[Cover], ends: Sequence[int], cut: HostCut | None
    ) -> "Ways":
        """Find where the covers part."""
        lines = [tree.line(end) for end in ends]
        first = max(_shared_length(lines), 1)
        paths = [
            [(line[i - 1], tree.tokens[line[i]]) for i in range(first, len(line))] for line in lines
        ]
        return Ways(covers, ends, paths, cut)

    @cached_property
    def nodes(self) -> frozenset[int]:
        """All nodes whose next token matters."""
        return frozenset({*self.ends, *(node for path in self.paths for node, _ in path)})

    def replies(self, logprobs: Tensor, place: Mapping[int, int], small: Strings) -> list[Reply]:
        """The covers that matter, with what follows them; none where the text cannot go on.

        Args:
            logprobs: Of the token after some nodes, shape [nodes, vocab].
            place: Row of each node.
            small: The small model's strings.
        """
        scores, lefts = [], []
        for cover, end, path in zip(self.covers, self.ends, self.paths, strict=True):
            score = sum(float(logprobs[place[node], token]) for node, token in path)
            # What goes on after a cover without a rest is any text, but not the end of one.
            score += small.log_mass_beyond(cover.rest, logprobs[place[end]])
            left = None
            if self.cut is not None and score > -math.inf:
                left = self.cut.left_of(logprobs[place[end]], cover.rest, small)
                score += math.log(left.others) if left.others else -math.inf
            scores.append(score)
            lefts.append(left)
        if max(scores, default=-math.inf) == -math.inf:
            return []
        shares = torch.tensor(scores, dtype=torch.float64).softmax(0)
        shares = torch.where(shares < MIN_SHARE, 0.0, shares)
        shares = (shares / shares.sum()).tolist()
        return [
            Reply(cover, end, _probs(logprobs[place[end]], left), share)
            for cover, end, left, share in zip(self.covers, self.ends, lefts, shares, strict=True)
            if share > 0
        ]


def _probs(logprobs: Tensor, left: Left | None) -> Tensor:
    return (logprobs if left is None else left.of(logprobs)).exp()


def _shared_length(lines: list[list[int]]) -> int:
    if not lines:
        return 0
    shortest = min(len(line) for line in lines)
    for i in range(shortest - 1, -1, -1):
        if len({line[i] for line in lines}) == 1:
            return i + 1
    return 0
