"""A vocabulary as strings: which tokens begin with given bytes, which begins a text."""

import bisect
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from trimtab.vocab import Vocabulary


@dataclass(frozen=True)
class Strings:
    """A vocabulary in byte order, to find all tokens that begin with given bytes."""

    vocabulary: Vocabulary

    @cached_property
    def _sorted(self) -> tuple[list[bytes], list[int]]:
        pairs = sorted(self.vocabulary.ids_by_bytes.items())
        return [text for text, _ in pairs], [token_id for _, token_id in pairs]

    @cached_property
    def longest(self) -> int:
        """Bytes of the longest token."""
        return max(len(text) for text in self._sorted[0])

    @cached_property
    def _longer(self) -> dict[bytes, Tensor]:
        return {}

    def longer_than(self, start: bytes) -> Tensor:
        """Ids of the tokens that begin with `start` and go beyond it, in byte order."""
        if start not in self._longer:
            texts, ids = self._sorted
            first = bisect.bisect_right(texts, start)
            after = successor(start)
            last = len(texts) if after is None else bisect.bisect_left(texts, after)
            self._longer[start] = torch.tensor(ids[first:last], dtype=torch.long)
        return self._longer[start]

    def first_token(self, text: bytes) -> int:
        """The longest token that begins a text; -1 if none does."""
        ids = self.vocabulary.ids_by_bytes
        for length in range(min(len(text), self.longest), 0, -1):
            if text[:length] in ids:
                return ids[text[:length]]
        return -1


def successor(start: bytes) -> bytes | None:
    """The first byte string after all that begin with `start`; None if there is none."""
    stripped = start.rstrip(b"\xff")
    return stripped[:-1] + bytes([stripped[-1] + 1]) if stripped else None


def token_lengths(vocabulary: Vocabulary) -> Tensor:
    """Bytes of each token, 0 for special ones, shape [vocab]."""
    return torch.tensor([len(text or b"") for text in vocabulary.token_bytes])
