"""The ways in which a small model may have read a context, weighed by its own probabilities."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
from torch import Tensor

from trimtab.align.covers import Cover
from trimtab.align.cut import HostCut
from trimtab.align.replies import Reply
from trimtab.align.strings import Strings
from trimtab.backends.token_tree import TokenTree

MIN_SHARE = 5e-3
"""Covers that are less likely than this are passed over."""

MIN_INSIDE = 0.02
"""Least share of a way through the last token, before it is known what follows."""


class Inside(NamedTuple):
    """A way to read a context whose next token begins inside the last one of the tokenizer's own.

    After `Mor`, which is a token, comes `bus`, and SmolLM2 reads `Morbus` as `M`, `orb`, `us`:
    there `M` has been read, and `or` is to be repeated.

    Attributes:
        question: Which context.
        node: The token before the last one.
        token_id: What is read of the last one.
        rest: The bytes of it that are not.
    """

    question: int
    node: int
    token_id: int
    rest: bytes


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

    def replies(
        self,
        logprobs: Tensor,
        place: Mapping[int, int],
        small: Strings,
        inside: Sequence[tuple[Inside, Tensor]] = (),
    ) -> list[Reply]:
        """The covers that matter, with what follows them; none where the text cannot go on.

        Args:
            logprobs: Of the token after some nodes, shape [nodes, vocab].
            place: Row of each node.
            small: The small model's strings.
            inside: Ways through the last token, which come last, each with log-probabilities of the
                token after what has been read, shape [vocab].
        """
        ways = self._weighed(logprobs, place, small)
        before = _sum_of(self.paths[0][:-1], logprobs, place) if inside else 0.0
        for one, after in inside:
            logprob = before + float(logprobs[place[one.node], one.token_id])
            logprob += small.log_mass_beyond(one.rest, after)
            ways.append(_Way(self._cover_of(one), one.node, after, logprob))
        found = list[tuple[int, _Way]]()
        total = -math.inf
        # A host's cut makes no way likelier: the first that is too unlikely is followed by none.
        for number in sorted(range(len(ways)), key=lambda number: -ways[number].logprob):
            way = ways[number]
            if way.logprob == -math.inf or (
                found and math.exp(min(way.logprob - total, 0.0)) < MIN_SHARE
            ):
                break
            if self.cut is not None:
                left = self.cut.left_of(way.after, way.cover.rest, small)
                logprob = math.log(left.others) if left.others else -math.inf
                way = way._replace(after=left.of(way.after), logprob=way.logprob + logprob)
            if way.logprob > -math.inf:
                total = float(np.logaddexp(total, way.logprob))
                found.append((number, way))
        return _as_shares([way for _, way in sorted(found, key=lambda one: one[0])], total)

    def inside(
        self, question: int, logprobs: Tensor, place: Mapping[int, int], small: Strings
    ) -> list[Inside]:
        """Ways through the last token that may matter, before it is known what follows them.

        None where the first cover has not read the context to its end, or has read one token alone
        with nothing before it.

        Args:
            question: Which context this is.
            logprobs: As for `replies`.
            place: As for `replies`.
            small: The small model's strings.
        """
        if not self.covers or self.covers[0].rest or not self.paths[0]:
            return []
        ways = self._weighed(logprobs, place, small)
        total = float(np.logaddexp.reduce([way.logprob for way in ways]))
        least = total + math.log(MIN_INSIDE) - _sum_of(self.paths[0][:-1], logprobs, place)
        node, last = self.paths[0][-1]
        text, found = small.bytes_of(last), list[Inside]()
        for size in range(1, len(text)):
            token_id = small.vocabulary.ids_by_bytes.get(text[:size])
            if token_id is not None and float(logprobs[place[node], token_id]) >= least:
                found.append(Inside(question, node, token_id, text[size:]))
        return [one for one in found if self._cover_of(one) not in self.covers]

    def _weighed(self, logprobs: Tensor, place: Mapping[int, int], small: Strings) -> list["_Way"]:
        """The covers with their log-probabilities, less that of the steps that all ways share."""
        ways = []
        for cover, end, path in zip(self.covers, self.ends, self.paths, strict=True):
            after = logprobs[place[end]]
            # What goes on after a cover without a rest is any text, but not the end of one.
            logprob = _sum_of(path, logprobs, place) + small.log_mass_beyond(cover.rest, after)
            ways.append(_Way(cover, end, after, logprob))
        return ways

    def _cover_of(self, one: Inside) -> Cover:
        return Cover((*self.covers[0].tokens[:-1], one.token_id), one.rest)


class _Way(NamedTuple):
    """A way to read a context, and how likely it is.

    Attributes:
        cover: The way.
        node: Its last token in the tree; of one that is not in it, the token before.
        after: Log-probabilities of the token that comes next, shape [vocab].
        logprob: Of the way, and of its going on.
    """

    cover: Cover
    node: int
    after: Tensor
    logprob: float


def _sum_of(path: Sequence[tuple[int, int]], logprobs: Tensor, place: Mapping[int, int]) -> float:
    """Log-probability of the steps of a path."""
    return sum(float(logprobs[place[node], token]) for node, token in path)


def _as_shares(ways: Sequence[_Way], total: float) -> list[Reply]:
    """Those that are likely enough, as shares of one.

    Args:
        ways: The ways.
        total: Logarithm of the sum of their probabilities.
    """
    likely = [(way, math.exp(way.logprob - total)) for way in ways]
    likely = [one for one in likely if one[1] >= MIN_SHARE]
    whole = sum(share for _, share in likely)
    return [Reply(way.cover, way.node, way.after.exp(), share / whole) for way, share in likely]


def _shared_length(lines: list[list[int]]) -> int:
    if not lines:
        return 0
    shortest = min(len(line) for line in lines)
    for i in range(shortest - 1, -1, -1):
        if len({line[i] for line in lines}) == 1:
            return i + 1
    return 0
