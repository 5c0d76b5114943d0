"""A memory at work on a host: what its entries propose, and how far to follow them."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from trimtab.anchors import Reading
from trimtab.carriers.gate import gate_features, gate_probs
from trimtab.carriers.memory import Memory
from trimtab.carriers.search import (
    MAPPED_MATCH_WEIGHT,
    OWN_MATCH_WEIGHT,
    Finds,
    Found,
    Index,
    look_up,
)


@dataclass(frozen=True)
class MountedMemory:
    """A memory seated on a host.

    Attributes:
        memory: The entries.
        index: Search over them.
        reading: From the host's state to the features that keys were made of.
        values: Host tokens that each entry proposes, -1 for none, shape [entries, proposals].
        shares: How likely the entry finds each, summing to at most one, same shape.
        finds: What entries are found by.
        is_own: The host made the keys itself, so that no map lies between it and them.
    """

    memory: Memory
    index: Index
    reading: Reading
    values: Tensor
    shares: Tensor
    finds: Finds = "both"
    is_own: bool = False

    def ask(
        self, hidden: Tensor, contexts: Tensor, small: Sequence[Tensor | None] = ()
    ) -> "Answer":
        """What the memory proposes.

        Args:
            hidden: The host's states, shape [questions, hidden of host].
            contexts: The bytes before each question, last byte first, [questions, CONTEXT_BYTES].
            small: The reference's own state after the same bytes, shape [hidden of small], where
                it runs beside the host and made the keys. None, or none at all, elsewhere.
        """
        own = torch.full((len(contexts),), self.is_own)
        features = None if self.finds == "bytes" else self.reading(hidden)
        if features is not None and small and not self.is_own:
            rows = zip(features, small, strict=True)
            read = [r if s is None else self.memory.features(s.float().cpu()) for r, s in rows]
            features = torch.stack(read)
            own = torch.tensor([s is not None for s in small])
        # By bytes alone there is no state to trust.
        trusted = own & (self.finds != "bytes")
        weight = torch.where(trusted, OWN_MATCH_WEIGHT, MAPPED_MATCH_WEIGHT)
        found = look_up(self.memory, self.index, features, contexts, weight, finds=self.finds)
        gates = torch.tensor([self._gate(is_own=False), self._gate(is_own=True)])
        return Answer(
            found, self.values[found.entries], self.shares[found.entries], gates[own.long()]
        )

    def only(self, kept: Tensor) -> "MountedMemory":
        """The memory that finds some of its entries alone, as if the others had never been.

        Args:
            kept: True for them, shape [entries]. Of none the memory proposes nothing.
        """
        index = self.index.only(kept)
        if not len(index.entries):
            # No search over no entries.
            return replace(self, values=torch.full_like(self.values, -1))
        return replace(self, index=index)

    def _gate(self, *, is_own: bool) -> tuple[float, ...]:
        """Weights of the gate that belongs to what entries are found by; one always is there."""
        special = self.memory.own_gate if is_own else ()
        special = self.memory.bytes_gate if self.finds == "bytes" else special
        return special or self.memory.gate


@dataclass(frozen=True)
class Answer:
    """Proposals of the neighbours.

    Attributes:
        found: The neighbours.
        values: Host tokens, -1 for none, shape [questions, neighbours, proposals].
        shares: How likely a neighbour finds each, same shape.
        gate: Weights of the gate, shape [questions, features].
    """

    found: Found
    values: Tensor
    shares: Tensor
    gate: Tensor

    def relabelled(self, place: Tensor) -> "Answer":
        """The same with each token id replaced by place[id]; -1 drops a proposal."""
        return replace(self, values=torch.where(self.values >= 0, place[self.values], -1))

    def probs(self, vocab: int) -> Tensor:
        """The memory's distribution, shape [questions, vocab]; sums to at most one."""
        weighted = self._weights * (self.values.flatten(1) >= 0)
        dense = torch.zeros(len(self.values), vocab)
        return dense.scatter_add(1, self.values.clamp_min(0).flatten(1), weighted)

    def prob_of(self, token_ids: Tensor) -> Tensor:
        """How likely the memory finds one token a question, shape [questions]."""
        return (self._weights * (self.values.flatten(1) == token_ids[:, None])).sum(1)

    def gates(
        self,
        logprobs: Tensor,
        shifts: Sequence[float] = (0.0,),
        *,
        tail_entropy_nats: Tensor | None = None,
    ) -> list[Tensor]:
        """How far to follow it, in (0, 1), shape [questions], at each shift of the log-odds.

        Args:
            logprobs: The steered model's, shape [questions, vocab].
            shifts: Added to the log-odds.
            tail_entropy_nats: As for `gate_features`.
        """
        features = self.gate_features(logprobs, tail_entropy_nats=tail_entropy_nats)
        return [gate_probs(features, self.gate, shift) for shift in shifts]

    def gate_features(self, logprobs: Tensor, *, tail_entropy_nats: Tensor | None = None) -> Tensor:
        """GATE_FEATURES of these proposals, given the steered model's [questions, vocab]."""
        return gate_features(
            self.found,
            self.values.flatten(1),
            logprobs,
            weights=self._weights,
            tail_entropy_nats=tail_entropy_nats,
        )

    @property
    def _weights(self) -> Tensor:
        return (self.shares * self.found.weights[..., None]).flatten(1)
