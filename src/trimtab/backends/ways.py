"""The ways in which a small model may have read a context, weighed by its own probabilities."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from torch import Tensor

from trimtab.align.covers import Cover
from trimtab.align.cut import HostCut
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
        scores = [
            sum(float(logprobs[place[node], token]) for node, token in path)
            # What goes on after a cover without a rest is any text, but not the end of one.
            + small.log_mass_beyond(cover.rest, logprobs[place[end]])
            for cover, end, path in zip(self.covers, self.ends, self.paths, strict=True)
        ]
        found = list[tuple[int, Tensor, float]]()
        total = -math.inf
        # A host's cut makes no way likelier: the first that is too unlikely is followed by none.
        for way in sorted(range(len(scores)), key=lambda way: -scores[way]):
            score = scores[way]
            if score == -math.inf or (found and math.exp(min(score - total, 0.0)) < MIN_SHARE):
                break
            after = logprobs[place[self.ends[way]]]
            if self.cut is not None:
                left = self.cut.left_of(after, self.covers[way].rest, small)
                score += math.log(left.others) if left.others else -math.inf
                after = left.of(after)
            if score > -math.inf:
                total = float(np.logaddexp(total, score))
                found.append((way, after, score))
        return self._replies(found, total)

    def _replies(self, found: Sequence[tuple[int, Tensor, float]], total: float) -> list[Reply]:
        """The ways that are likely enough, in their order, as shares of one."""
        likely = [
            (way, after, math.exp(score - total))
            for way, after, score in sorted(found, key=lambda one: one[0])
        ]
        likely = [one for one in likely if one[2] >= MIN_SHARE]
        whole = sum(share for _, _, share in likely)
        return [
            Reply(self.covers[way], self.ends[way], after.exp(), share / whole)
            for way, after, share in likely
        ]


def _shared_length(lines: list[list[int]]) -> int:
    if not lines:
        return 0
    shortest = min(len(line) for line in lines)
    for i in range(shortest - 1, -1, -1):
        if len({line[i] for line in lines}) == 1:
            return i + 1
    return 0
