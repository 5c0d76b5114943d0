"""The memory: what came next wherever the reference was in a similar state.

A nearest-neighbour language model (Khandelwal et al. 2020) whose neighbours are found by the
small model's hidden state and then weighed by how many bytes of the text before them agree with
the text before the question. The state says where to look; the bytes, which need no map between
models, say how far to trust what is found.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import faiss
import numpy as np
import torch
from torch import Tensor

from trimtab.anchors import Reading

CONTEXT_BYTES = 16
"""Bytes before an entry that are compared with the bytes before a question."""

VALUE_BYTES = 32
"""Bytes after an entry that are read to find the token that followed."""

NEIGHBOURS = 128
TEMPERATURE = 0.1
MATCH_WEIGHT = 0.4
"""A byte more in common counts like so much times TEMPERATURE more cosine."""

MIN_SPREAD = 0.05
"""A feature that varies less than this is not blown up: its weight would not transfer."""

GATE_FEATURES = (
    "one",
    "longest_match",
    "mean_match",
    "top_prob",
    "log_overlap",
    "entropy_nats",
    "top_logprob",
)


@dataclass(frozen=True)
class Memory:
    """Entries of a memory; entry i is asked by keys[i] and answered by text[positions[i]:].

    Attributes:
        keys: Unit vectors in float16, shape [entries, key].
        projection: Whitening of the small model's states, shape [key, hidden].
        mean: Shape [hidden]; a question is normalise(projection @ (h - mean)).
        text: The documents, each after CONTEXT_BYTES zero bytes, uint8, shape [bytes].
        positions: Where what followed begins, shape [entries].
        gate: Weights of GATE_FEATURES: the log-odds that the memory speaks.
        soft_ids: The expert's most likely tokens, as places in `soft_strings`, [entries, kept];
            None where entries answer only by what followed.
        soft_probs: Their probabilities, shape [entries, kept].
        soft_strings: Bytes of the tokens; empty for one that stands for no text.
    """

    keys: Tensor
    projection: Tensor
    mean: Tensor
    text: Tensor
    positions: Tensor
    gate: tuple[float, ...] = ()
    soft_ids: Tensor | None = None
    soft_probs: Tensor | None = None
    soft_strings: tuple[bytes, ...] = ()

    def __len__(self) -> int:
        """Number of entries."""
        return len(self.keys)

    def features(self, hidden: Tensor) -> Tensor:
        """Whitened states, shape [..., key]; not yet normalised."""
        return (hidden - self.mean) @ self.projection.T


@dataclass(frozen=True)
class Found:
    """Entries near each question.

    Attributes:
        entries: Indices of entries, shape [questions, neighbours].
        weights: Their shares, summing to one, shape [questions, neighbours].
        matched_bytes: Bytes that agree before entry and question, at most CONTEXT_BYTES.
    """

    entries: Tensor
    weights: Tensor
    matched_bytes: Tensor


def whitening(states: Tensor, key_size: int) -> tuple[Tensor, Tensor]:
    """Principal directions of the states, scaled to unit variance.

    Unwhitened cosines are ruled by the few directions in which all states vary most.

    Args:
        states: Shape [positions, hidden].
        key_size: Directions to keep, at most hidden.

    Returns:
        projection [key, hidden] and mean [hidden].
    """
    mean = states.mean(0)
    centred = states - mean
    variance, directions = torch.linalg.eigh(centred.T @ centred / len(states))
    kept = slice(-min(key_size, len(mean)), None)
    scale = variance[kept].clamp_min(1e-6 * float(variance[-1])).sqrt()
    return (directions[:, kept] / scale).T.flip(0).contiguous(), mean


def lay_out(documents: list[bytes]) -> tuple[Tensor, list[int]]:
    """Put documents into one byte tensor, parted by CONTEXT_BYTES zero bytes.

    Returns:
        The text, and where each document begins in it.
    """
    gap = bytes(CONTEXT_BYTES)
    starts, length = [], 0
    for document in documents:
        starts.append(length + len(gap))
        length += len(gap) + len(document)
    joined = b"".join(gap + document for document in documents) + gap
    return torch.frombuffer(bytearray(joined), dtype=torch.uint8), starts


def contexts_before(text: Tensor, positions: Tensor) -> Tensor:
    """The bytes before each position, last byte first, shape [positions, CONTEXT_BYTES]."""
    return text[positions[:, None] - 1 - torch.arange(CONTEXT_BYTES)]


def last_bytes(contexts: Sequence[bytes]) -> Tensor:
    """The last bytes before each question, last byte first, zero padded: [.., CONTEXT_BYTES]."""
    ends = (text[-CONTEXT_BYTES:][::-1].ljust(CONTEXT_BYTES, b"\0") for text in contexts)
    joined = torch.frombuffer(bytearray(b"".join(ends)), dtype=torch.uint8)
    return joined.reshape(-1, CONTEXT_BYTES)


def build_index(memory: Memory) -> faiss.IndexFlatIP:
    """Exact inner-product search over the keys."""
    index = faiss.IndexFlatIP(memory.keys.shape[1])
    index.add(memory.keys.float().numpy())  # pyright: ignore[reportCallIssue]
    return index


def look_up(
    memory: Memory,
    index: faiss.IndexFlatIP,
    features: Tensor,
    contexts: Tensor,
) -> Found:
    """Find the entries nearest to each question and weigh them.

    weight ~ exp(cosine / TEMPERATURE + MATCH_WEIGHT * matched bytes).

    Args:
        memory: The memory.
        index: Of its keys.
        features: Whitened states of the questions, shape [questions, key].
        contexts: Bytes before each question, last first, [questions, CONTEXT_BYTES].
    """
    questions = torch.nn.functional.normalize(features.float(), dim=-1)
    count = min(NEIGHBOURS, len(memory))
    cosines_np, entries_np = index.search(  # pyright: ignore[reportCallIssue]
        np.ascontiguousarray(questions.numpy()), count
    )
    cosines, entries = torch.from_numpy(cosines_np), torch.from_numpy(entries_np)
    before = contexts_before(memory.text, memory.positions[entries.flatten()])
    agree = before.view(*entries.shape, CONTEXT_BYTES) == contexts[:, None]
    matched = agree.to(torch.uint8).cumprod(-1).sum(-1)
    scores = cosines / TEMPERATURE + MATCH_WEIGHT * matched
    return Found(entries, scores.softmax(-1), matched)


def gate_features(
    found: Found, values: Tensor, logprobs: Tensor, *, weights: Tensor | None = None
) -> Tensor:
    """What a gate can know before it opens, shape [questions, len(GATE_FEATURES)].

    All features are comparable between models and tokenizers: they are read from bytes, from
    shares, and from the steered model's own uncertainty, never from cosines, whose level differs
    from host to host.

    Args:
        found: What the memory found.
        values: Proposed tokens, -1 for none, shape [questions, proposals]; one a neighbour
            unless `weights` is given.
        logprobs: The steered model's log-probabilities, shape [questions, vocab].
        weights: How likely the memory finds each proposal, shape [questions, proposals].
    """
    has_value = values >= 0
    proposed = logprobs.gather(1, values.clamp_min(0)).exp() * has_value
    weights = (found.weights if weights is None else weights) * has_value
    dense = torch.zeros_like(logprobs, dtype=weights.dtype)
    top_prob = dense.scatter_add(1, values.clamp_min(0), weights).amax(-1)
    probs = logprobs.exp()
    entropy = -(probs * logprobs.clamp_min(-1e4)).sum(-1)
    matched = found.matched_bytes.float() / CONTEXT_BYTES
    return torch.stack(
        [
            torch.ones(len(values)),
            matched.amax(1),
            (found.weights * matched).sum(1),
            top_prob,
            ((weights * proposed).sum(1) + 1e-4).log(),
            entropy,
            logprobs.amax(-1),
        ],
        1,
    )


def gate_probs(features: Tensor, gate: tuple[float, ...]) -> Tensor:
    """How much of the prediction the memory makes, in (0, 1), shape [questions]."""
    return torch.sigmoid(features @ torch.tensor(gate)).clamp(1e-6, 1 - 1e-6)


def fit_gate(
    features: Tensor,
    logprob: Tensor,
    memory_logprob: Tensor,
    weight: Tensor,
    *,
    decay: float = 1e-3,
) -> tuple[float, ...]:
    """Learn when the memory helps, from a model and text that need no host.

    Maximises the likelihood of (1 - g) p + g p_memory with g = sigmoid(w . features): a convex
    likelihood in each g, solved by L-BFGS. Features are standardised while fitting.

    Args:
        features: Shape [positions, features]; the first is constant one.
        logprob: The model's log-probability of what came next, shape [positions].
        memory_logprob: The memory's, -inf where it does not propose it, shape [positions].
        weight: How much each position counts, summing to one, shape [positions].
        decay: L2 penalty on the standardised weights.
    """
    mean, std = features.mean(0), features.std(0).clamp_min(MIN_SPREAD)
    mean[0], std[0] = 0.0, 1.0
    standard = (features - mean) / std
    weights = torch.zeros(features.shape[1])
    weights[0] = -3.0
    weights.requires_grad_()
    optimiser = torch.optim.LBFGS([weights], max_iter=300, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimiser.zero_grad()
        log_odds = standard @ weights
        closed = torch.nn.functional.logsigmoid(-log_odds)
        opened = torch.nn.functional.logsigmoid(log_odds)
        mixed = torch.logaddexp(logprob + closed, memory_logprob.clamp_min(-30) + opened)
        value = -(weight * mixed).sum() + decay * (weights[1:] ** 2).sum()
        value.backward()
        return value

    optimiser.step(loss)  # pyright: ignore[reportArgumentType]
    raw = weights.detach() / std
    raw[0] = weights.detach()[0] - (raw[1:] * mean[1:]).sum()
    return tuple(raw.tolist())


@dataclass(frozen=True)
class MountedMemory:
    """A memory seated on a host.

    Attributes:
        memory: The entries.
        index: Search over their keys.
        reading: From the host's state to the features that keys were made of.
        values: Host tokens that each entry proposes, -1 for none, shape [entries, proposals].
        shares: How likely the entry finds each, summing to at most one, same shape.
    """

    memory: Memory
    index: faiss.IndexFlatIP
    reading: Reading
    values: Tensor
    shares: Tensor

    def ask(self, hidden: Tensor, contexts: Tensor) -> "Answer":
        """What the memory proposes after states [questions, hidden] and bytes before them."""
        found = look_up(self.memory, self.index, self.reading(hidden), contexts)
        return Answer(found, self.values[found.entries], self.shares[found.entries])


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

    def gate(self, logprobs: Tensor, weights: tuple[float, ...]) -> Tensor:
        """How far to follow it, given the steered model's [questions, vocab], in (0, 1)."""
        return gate_probs(self.gate_features(logprobs), weights)

    def gate_features(self, logprobs: Tensor) -> Tensor:
        """GATE_FEATURES of these proposals, given the steered model's [questions, vocab]."""
        return gate_features(self.found, self.values.flatten(1), logprobs, weights=self._weights)

    @property
    def _weights(self) -> Tensor:
        return (self.shares * self.found.weights[..., None]).flatten(1)
