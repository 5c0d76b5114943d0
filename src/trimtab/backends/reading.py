"""Texts as expert and reference have read them."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from trimtab.align.covers import Cover
from trimtab.backends.pair import PairStates
from trimtab.backends.token_tree import ModelCache, TokenTree
from trimtab.unembedding import Unembedding

FEW_NODES = 64
"""Contexts' ends whose logits are computed at once and kept until the next reading."""

Who = Literal["expert", "reference"]
"""One of the pair."""

WHO: tuple[Who, ...] = ("expert", "reference")


class OwnReading(NamedTuple):
    """A text as both models have read it, on their own tokens.

    Attributes:
        token_ids: All tokens, those before the text included.
        states: What each model has made of them, two tensors of shape [tokens, hidden].
    """

    token_ids: list[int]
    states: PairStates


@dataclass
class PairCaches:
    """What both models keep of the last contexts that they have read."""

    reference: ModelCache = field(default_factory=ModelCache)
    expert: ModelCache = field(default_factory=ModelCache)


@dataclass(frozen=True)
class LiveReading:
    """Contexts as both models have read them.

    Attributes:
        tree: All token sequences.
        covers: Ways to read each context.
        ends: Node of each way's last token.
        host_lasts: As given to `read`.
        expert: Final hidden states of the nodes, shape [nodes, hidden].
        reference: Likewise.
        caches: Keys and values of all nodes, until the same row is read again.
        kept_logits: By model the logits after nodes that have been asked for, each [vocab].
    """

    tree: TokenTree
    covers: list[list[Cover]]
    ends: list[list[int]]
    host_lasts: Sequence[int | None]
    expert: Tensor
    reference: Tensor
    caches: PairCaches
    kept_logits: dict[Who, dict[int, Tensor]] = field(
        default_factory=lambda: {"expert": {}, "reference": {}}
    )

    @cached_property
    def last_nodes(self) -> frozenset[int]:
        """The last node of every way to read a context."""
        return frozenset(node for ends in self.ends for node in ends)

    def states_of(self, who: Who) -> Tensor:
        """What a model has made of the nodes, shape [nodes, hidden]."""
        return self.expert if who == "expert" else self.reference

    def reference_states(self, questions: range) -> list[Tensor | None]:
        """The reference's state after some contexts, read as its tokenizer cuts them.

        None where a context ends inside a character, or where there is nothing to read.
        """
        return [
            self.reference[self.ends[q][0]]
            if self.covers[q] and not self.covers[q][0].rest
            else None
            for q in questions
        ]

    def own(self, question: int) -> OwnReading:
        """How the small models' tokenizer cuts a context, and what both models make of that."""
        nodes = self.tree.line(self.ends[question][0])
        states = PairStates(self.reference[nodes], self.expert[nodes])
        return OwnReading([self.tree.tokens[node] for node in nodes], states)


@dataclass(frozen=True)
class RowText:
    """The text of one row of a generation, before its next token.

    Attributes:
        row: Names the row; what both models have read of it before is kept.
        context: The text's bytes.
        host_ids: The host's tokens of it, without those that stand for no text.
        host_last: The host's last token where the host itself has written it; None where somebody
            else has cut the text, as at a prompt's end.
        start: Tokens of the small models that the text goes on from; None for what they expect
            before any text.
    """

    row: int
    context: bytes
    host_ids: Sequence[int]
    host_last: int | None = None
    start: Sequence[int] | None = None


class Plan(NamedTuple):
    """Contexts that are to be read: as `LiveReading`, without states."""

    tree: TokenTree
    covers: list[list[Cover]]
    ends: list[list[int]]
    host_lasts: Sequence[int | None]
    caches: PairCaches


class Part(NamedTuple):
    """A reading, those of its contexts that are asked, and the host's probabilities there.

    `told_apart` is as for `Live.score`.
    """

    reading: LiveReading
    questions: range
    host_probs: Tensor
    told_apart: Sequence[int] = ()


class PairProbs(NamedTuple):
    """Probabilities of the candidates, each [contexts, candidates]; each row sums to <= 1."""

    expert: Tensor
    reference: Tensor


def logits_after(reading: LiveReading, who: Who, head: Unembedding, nodes: Sequence[int]) -> Tensor:
    """Logits after some nodes, in float32 on the CPU, shape [nodes, vocab].

    Where few contexts were read they are asked one by one, and each more than once: as a head's
    matrix hardly fits through a processor's memory, it is read once for all of them.
    """
    if len(reading.last_nodes) > FEW_NODES:
        return logits_of(head, reading.states_of(who)[list(nodes)])
    if {*nodes} - reading.kept_logits[who].keys():
        keep_logits(who, head, [reading], nodes)
    return torch.stack([reading.kept_logits[who][node] for node in nodes])


def keep_logits(
    who: Who, head: Unembedding, readings: Sequence[LiveReading], also: Sequence[int] = ()
) -> None:
    """Compute the logits after the last nodes of some readings at once, where these are few.

    Args:
        who: Whose.
        head: Its.
        readings: They keep them.
        also: Further nodes of each.
    """
    missing = [
        (reading, node)
        for reading in readings
        if len(reading.last_nodes) <= FEW_NODES
        for node in sorted({*also, *reading.last_nodes} - reading.kept_logits[who].keys())
    ]
    if not missing:
        return
    states = torch.stack([reading.states_of(who)[node] for reading, node in missing])
    for (reading, node), logits in zip(missing, logits_of(head, states), strict=True):
        reading.kept_logits[who][node] = logits


def logits_of(head: Unembedding, states: Tensor) -> Tensor:
    """Logits of states, in float32 on the CPU."""
    with torch.no_grad():
        return head.logits(states).float().cpu()
