"""The memory's entries: states of the reference in the training text, and what followed each.

`search` finds entries, `gate` says when they may speak, `recall` puts both to use on a host.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trimtab.carriers.sources import Sources

CONTEXT_BYTES = 16
"""Bytes before an entry that are compared with the bytes before a question."""

VALUE_BYTES = 32
"""Bytes after an entry that are read to find the token that followed."""

_LEAST_VARIANCE = 1e-12
"""Of states, as a part of their mean square: float32 rounds a mean by as much."""


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
        own_gate: The same where the model that made the keys asks with its own state.
        bytes_gate: The same for entries that are found by bytes alone.
        soft_ids: The expert's most likely tokens, as places in `soft_strings`, [entries, kept];
            None where entries answer only by what followed.
        soft_probs: Their probabilities in float16, shape [entries, kept].
        soft_strings: Bytes of the tokens; empty for one that stands for no text.
        sources: The documents by name; None in a memory that does not name them.
    """

    keys: Tensor
    projection: Tensor
    mean: Tensor
    text: Tensor
    positions: Tensor
    gate: tuple[float, ...] = ()
    own_gate: tuple[float, ...] = ()
    bytes_gate: tuple[float, ...] = ()
    soft_ids: Tensor | None = None
    soft_probs: Tensor | None = None
    soft_strings: tuple[bytes, ...] = ()
    sources: Sources | None = None

    def __len__(self) -> int:
        """Number of entries."""
        return len(self.keys)

    def features(self, hidden: Tensor) -> Tensor:
        """Whitened states, shape [..., key]; not yet normalised."""
        return (hidden - self.mean) @ self.projection.T


def varies(states: Tensor) -> bool:
    """Whether states differ by more than rounding; others have no directions to whiten.

    Args:
        states: Shape [positions, hidden].
    """
    variance = (states - states.mean(0)).square().sum()
    return bool(variance > _LEAST_VARIANCE * states.square().sum())


def whitening(states: Tensor, key_size: int) -> tuple[Tensor, Tensor]:
    """Principal directions of the states, scaled to unit variance.

    Unwhitened cosines are ruled by the few directions in which all states vary most.

    Args:
        states: Shape [positions, hidden]; they vary.
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


def unit_keys(states: Tensor, projection: Tensor, mean: Tensor) -> Tensor:
    """Keys of states, unit vectors in float16, shape [states, key]; as `whitening` has them."""
    whitened = (states.float() - mean) @ projection.T
    return torch.nn.functional.normalize(whitened, dim=-1).half()


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


def documents_of(text: Tensor) -> tuple[list[bytes], list[int]]:
    """The documents of a laid-out text, empty ones left out, and where each begins in it.

    A document that holds CONTEXT_BYTES zero bytes in a row comes back as several.
    """
    gap = bytes(CONTEXT_BYTES)
    documents, starts, place = [], [], 0
    for part in text.numpy().tobytes().split(gap):
        if part:
            documents.append(part)
            starts.append(place)
        place += len(part) + len(gap)
    return documents, starts


def joined_text(memory: Memory, more: Sequence[Memory]) -> tuple[Tensor, Tensor, Sources]:
    """A memory with others' entries behind its own, but for the keys, which take nearly all room.

    Args:
        memory: The memory, which answers with what followed.
        more: Others of the same projection, with documents of their own.

    Returns:
        Text, positions and documents.
    """
    texts, positions, length = [memory.text], [memory.positions], len(memory.text)
    sources = sources_of(memory)
    names, starts = list(sources.names), list(sources.starts)
    for other in more:
        # A gap lies at both ends of a text; one is enough between two.
        shift = length - CONTEXT_BYTES
        texts.append(other.text[CONTEXT_BYTES:])
        positions.append(other.positions + shift)
        sources = sources_of(other)
        names += sources.names
        starts += [start + shift for start in sources.starts]
        length += len(texts[-1])
    return torch.cat(texts), torch.cat(positions), Sources(tuple(names), tuple(starts))


def sources_of(memory: Memory) -> Sources:
    """The documents of a memory; by number where it does not name them."""
    if memory.sources:
        return memory.sources
    starts = documents_of(memory.text)[1]
    names = (f"document {number}" for number in range(1, len(starts) + 1))
    return Sources(tuple(names), tuple(starts))


def contexts_before(text: Tensor, positions: Tensor) -> Tensor:
    """The bytes before each position, last byte first, shape [positions, CONTEXT_BYTES]."""
    return text[positions[:, None] - 1 - torch.arange(CONTEXT_BYTES)]


def last_bytes(contexts: Sequence[bytes]) -> Tensor:
    """The last bytes before each question, last byte first, zero padded: [.., CONTEXT_BYTES]."""
    ends = (text[-CONTEXT_BYTES:][::-1].ljust(CONTEXT_BYTES, b"\0") for text in contexts)
    joined = torch.frombuffer(bytearray(b"".join(ends)), dtype=torch.uint8)
    return joined.reshape(-1, CONTEXT_BYTES)
