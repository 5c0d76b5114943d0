"""Texts as expert and reference have read them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from trimtab.align.covers import Cover
from trimtab.backends.growing_text import GrowingText
from trimtab.backends.hf import HFModel
from trimtab.backends.pair import Pair, PairStates
from trimtab.backends.token_tree import ModelCache, TokenTree
from trimtab.errors import ModelError
from trimtab.unembedding import Unembedding

FEW_NODES = 64
"""Contexts' ends whose logits are computed at once and kept until the next reading."""

Who = Literal["expert", "reference"]
"""One of the pair."""

WHO: tuple[Who, ...] = ("expert", "reference")

Heads = Mapping[Who, Unembedding]


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
    """What both models keep of the last contexts that they have read.

    Attributes:
        both: Where one pass serves both, of the reference and then of the expert.
        reference: Elsewhere, of the reference.
        expert: Of the expert.
        texts: How the tokenizer has cut the texts before: those that begin, by False, and those
            that follow other tokens, by True.
    """

    both: ModelCache = field(default_factory=ModelCache)
    reference: ModelCache = field(default_factory=ModelCache)
    expert: ModelCache = field(default_factory=ModelCache)
    texts: dict[bool, GrowingText] = field(default_factory=dict)

    def text(self, pair: Pair, *, follows: bool) -> GrowingText:
        """The pair's tokenizer, which need not cut anew what it has cut before.

        Args:
            pair: Always the same.
            follows: The text follows other tokens.
        """
        if follows not in self.texts:
            self.texts[follows] = pair.growing_text(follows=follows)
        return self.texts[follows]

    def beside(self) -> "PairCaches":
        """Others that go on from the same contexts by themselves."""
        return PairCaches(self.both.beside(), self.reference.beside(), self.expert.beside())


@dataclass(frozen=True)
class LiveReading:
    """Contexts as both models have read them.

    Attributes:
        tree: All token sequences.
        covers: Ways to read each context.
        ends: Node of each way's last token.
        host_lasts: As given to `read`.
        states: Final hidden states of the nodes, each of shape [nodes, hidden].
        caches: Keys and values of all nodes, until the same row is read again.
        kept_logits: By model the logits after nodes that have been asked for, each [vocab].
    """

    tree: TokenTree
    covers: list[list[Cover]]
    ends: list[list[int]]
    host_lasts: Sequence[int | None]
    states: PairStates
    caches: PairCaches
    kept_logits: dict[Who, dict[int, Tensor]] = field(
        default_factory=lambda: {"expert": {}, "reference": {}}
    )

    @cached_property
    def last_nodes(self) -> frozenset[int]:
        """The last node of every way to read a context."""
        return frozenset(node for ends in self.ends for node in ends)

    def reference_states(self, questions: range) -> list[Tensor | None]:
        """The reference's state after some contexts, read as its tokenizer cuts them.

        None where a context ends inside a character, or where there is nothing to read.
        """
        return [
            self.states.reference[self.ends[q][0]]
            if self.covers[q] and not self.covers[q][0].rest
            else None
            for q in questions
        ]

    def own(self, question: int) -> OwnReading:
        """How the small models' tokenizer cuts a context, and what both models make of that."""
        nodes = self.tree.line(self.ends[question][0])
        states = PairStates(self.states.reference[nodes], self.states.expert[nodes])
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

    @property
    def longest(self) -> int:
        """Tokens of the longest way to read a context, with those before it."""
        return max(self.tree.depths, default=-1) + 1

    def check(self, small: HFModel) -> None:
        """Refuse contexts for which a small model has too few positions.

        Raises:
            ModelError: They are longer.
        """
        if small.max_tokens is not None and self.longest > small.max_tokens:
            raise ModelError(
                f"the text has {self.longest} tokens of {small.ref}, which reads at most"
                f" {small.max_tokens}",
                hint="give a shorter text, or use --carriers head,memory",
            )


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


def logits_after(reading: LiveReading, who: Who, heads: Heads, nodes: Sequence[int]) -> Tensor:
    """Logits after some nodes, in float32 on the CPU, shape [nodes, vocab].

    Where few contexts were read they are asked one by one, and each more than once: as a head's
    matrix hardly fits through a processor's memory, it is read once for all of them.
    """
    if len(reading.last_nodes) > FEW_NODES:
        states: Tensor = getattr(reading.states, who)
        return logits_of(heads[who], states[list(nodes)])
    keep_logits({who: heads[who]}, [reading], nodes)
    return torch.stack([reading.kept_logits[who][node] for node in nodes])


def keep_logits(heads: Heads, readings: Sequence[LiveReading], also: Sequence[int] = ()) -> None:
    """Compute the logits after the last nodes of some readings at once, where these are few.

    Args:
        heads: Of the models whose logits are wanted.
        readings: They keep them.
        also: Further nodes of each.
    """
    missing: dict[Who, list[tuple[LiveReading, int]]] = {
        who: [
            (reading, node)
            for reading in readings
            if len(reading.last_nodes) <= FEW_NODES
            for node in sorted({*also, *reading.last_nodes} - reading.kept_logits[who].keys())
        ]
        for who in heads
    }
    states: dict[Who, Tensor] = {}
    for who, places in missing.items():
        if places:
            states[who] = torch.stack(
                [getattr(reading.states, who)[node] for reading, node in places]
            )
    for who, found in logits_of_both(heads, states).items():
        for (reading, node), logits in zip(missing[who], found, strict=True):
            reading.kept_logits[who][node] = logits


def logits_of_both(heads: Heads, states: dict[Who, Tensor]) -> dict[Who, Tensor]:
    """Logits of states of one model or both, of both at once where they have one head."""
    if len(states) > 1 and heads["expert"].weight is heads["reference"].weight:
        sizes = [len(some) for some in states.values()]
        together = logits_of(heads["reference"], torch.cat(list(states.values())))
        return dict(zip(states, together.split(sizes), strict=True))
    return {who: logits_of(heads[who], some) for who, some in states.items()}


def logits_of(head: Unembedding, states: Tensor) -> Tensor:
    """Logits of states, in float32 on the CPU."""
    with torch.no_grad():
        return head.logits(states).float().cpu()
