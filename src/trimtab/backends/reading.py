"""Texts as expert and reference have read them."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal, NamedTuple

from torch import Tensor

from trimtab.align.covers import Cover
from trimtab.backends.pair import PairStates
from trimtab.backends.token_tree import ModelCache, TokenTree

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
    """A reading, those of its contexts that are asked, and the host's probabilities there."""

    reading: LiveReading
    questions: range
    host_probs: Tensor
