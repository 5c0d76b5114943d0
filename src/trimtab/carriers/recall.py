"""A memory at work on a host: what its entries propose, and how far to follow them."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trimtab.anchors import Reading
from trimtab.carriers.gate import gate_features, gate_probs
from trimtab.carriers.memory import Memory
from trimtab.carriers.search import Finds, Found, Index, look_up


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
    """

    memory: Memory
    index: Index
    reading: Reading
    values: Tensor
    shares: Tensor
    finds: Finds = "both"

    def ask(
        self, hidden: Tensor, contexts: Tensor, small: Sequence[Tensor | None] = ()
    ) -> "Answer":
        """What the memory proposes.

        Args:
            hidden: The host's states, shape [questions, hidden of host].
            contexts: The bytes before each question, last byte first, [questions, CONTEXT_BYTES].
            small: The reference's own state after the same bytes, shape [hidden of small], where
                it runs beside the host: no map blurs it. None, or none at all, where it does not.
        """
        features = None if self.finds == "bytes" else self.reading(hidden)
        if features is not None and small:
            rows = zip(features, small, strict=True)
            own = [r if s is None else self.memory.features(s.float().cpu()) for r, s in rows]
            features = torch.stack(own)
        found = look_up(self.memory, self.index, features, contexts, finds=self.finds)
        return Answer(found, self.values[found.entries], self.shares[found.entries])

    @property
    def gate(self) -> tuple[float, ...]:
        """Weights of the gate that belongs to what entries are found by.

        An adapter need not have learnt one for entries found by bytes alone.
        """
        by_bytes = self.finds == "bytes" and self.memory.bytes_gate
        return self.memory.bytes_gate if by_bytes else self.memory.gate


@dataclass(frozen=True)
class Answer:
    """Proposals of the neighbours, shapes [questions, neighbours, proposals]."""

    found: Found
    values: Tensor
    shares: Tensor

    def relabelled(self, place: Tensor) -> "Answer":
        """The same with each token id replaced by place[id]; -1 drops a proposal."""
        return Answer(
            self.found, torch.where(self.values >= 0, place[self.values], -1), self.shares
        )

    def probs(self, vocab: int) -> Tensor:
        """The memory's distribution, shape [questions, vocab]; sums to at most one."""
        weighted = self._weights * (self.values.flatten(1) >= 0)
        dense = torch.zeros(len(self.values), vocab)
        return dense.scatter_add(1, self.values.clamp_min(0).flatten(1), weighted)

    def prob_of(self, token_ids: Tensor) -> Tensor:
        """How likely the memory finds one token a question, shape [questions]."""
        return (self._weights * (self.values.flatten(1) == token_ids[:, None])).sum(1)

    def gates(
        self, logprobs: Tensor, weights: tuple[float, ...], shifts: Sequence[float] = (0.0,)
    ) -> list[Tensor]:
        """How far to follow it, in (0, 1), shape [questions], at each shift of the log-odds.

        Args:
            logprobs: The steered model's, shape [questions, vocab].
            weights: Of the gate.
            shifts: Added to the log-odds.
        """
        features = self.gate_features(logprobs)
        return [gate_probs(features, weights, shift) for shift in shifts]

    def gate_features(self, logprobs: Tensor) -> Tensor:
        """GATE_FEATURES of these proposals, given the steered model's [questions, vocab]."""
        return gate_features(self.found, self.values.flatten(1), logprobs, weights=self._weights)

    @property
    def _weights(self) -> Tensor:
        return (self.shares * self.found.weights[..., None]).flatten(1)
