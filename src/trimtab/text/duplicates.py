"""Near-duplicates: training text that a test text repeats would make every figure a lie."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import NamedTuple, cast

import numpy as np
from datasketch import MinHash, MinHashLSH

from trimtab.types import Document

Shingles = np.ndarray
"""Sorted distinct 64-bit fingerprints of a text's shingles."""

_TOKEN = re.compile(r"\w+|[^\w\s]")
THRESHOLD, SHINGLE_TOKENS = 0.5, 5
"""Similarity from which on a text repeats another, over sets of runs of so many tokens."""

_PERMUTATIONS = 128
_SEED = 1
_MISSED_PROBABILITY = 1e-6
# Shingles that are permuted at once: 128 permutations of 8 bytes make 16 MB.
_BATCH = 2**14


class Dropped(NamedTuple):
    """A document that was removed, and the one that it repeats."""

    name: str
    like: str
    jaccard: float


@dataclass(frozen=True)
class Deduplicated:
    """What is left of a training corpus, and what was removed.

    Attributes:
        kept: The documents that stay, in their order.
        dropped: The removed ones with the nearest test document (or, for a repetition within
            the training text, the earlier training document) and their Jaccard similarity.
    """

    kept: tuple[Document, ...]
    dropped: tuple[Dropped, ...]


class _Hashes(dict[str, int]):
    """64-bit hash by token, computed once."""

    def __missing__(self, token: str) -> int:
        """Hash a token that is met for the first time."""
        digest = blake2b(token.encode("utf-8", "surrogatepass"), digest_size=8).digest()
        value = self[token] = int.from_bytes(digest, "big")
        return value


def drop_near_duplicates(
    train: Sequence[Document],
    test: Sequence[Document],
    *,
    threshold: float = THRESHOLD,
    shingle_tokens: int = SHINGLE_TOKENS,
) -> Deduplicated:
    """Remove training documents that repeat a test document or an earlier training document.

    A test document is repeated from a Jaccard similarity of `threshold` on, over the sets of
    runs of `shingle_tokens` tokens (words and single symbols; a shorter text is one run). MinHash
    proposes candidates and the exact similarity decides, so that nothing is removed wrongly and a
    pair at the threshold is missed with a probability below 1e-6. An earlier training document is
    repeated when text and loss spans are equal. Not covered: a passage of a test document
    inside a much longer one; scripts without spaces, where a clause is one token.

    Raises:
        ValueError: The threshold is not in (0, 1], or shingle_tokens is below 1.
    """
    if not 0 < threshold <= 1 or shingle_tokens < 1:
        raise ValueError(f"threshold {threshold} or shingle_tokens {shingle_tokens} out of range")
    nearest = _Nearest(test, threshold, shingle_tokens)
    earlier: dict[tuple[str, tuple[tuple[int, int], ...]], str] = {}
    kept: list[Document] = []
    dropped: list[Dropped] = []
    for document in train:
        found = nearest.to(document)
        twin = earlier.setdefault((document.text, document.loss_spans), document.name)
        if found is None and twin != document.name:
            found = Dropped(document.name, twin, 1.0)
        if found is None:
            kept.append(document)
        else:
            dropped.append(found)
    return Deduplicated(tuple(kept), tuple(dropped))


def near_repeats(documents: Sequence[Document], of: Sequence[Document]) -> list[list[int]]:
    """Which documents nearly repeat each of some texts.

    Similarity and threshold are those that `drop_near_duplicates` has by default.

    Args:
        documents: Where repetitions are sought.
        of: The texts.

    Returns:
        For each text the places of the documents that repeat it, ascending.
    """
    nearest = _Nearest(documents, THRESHOLD, SHINGLE_TOKENS)
    return [sorted(nearest.all_near(document)) for document in of]


def _shingles(text: str, shingle_tokens: int, hashes: _Hashes) -> Shingles:
    tokens = np.array([hashes[token] for token in _TOKEN.findall(text)], dtype=np.uint64)
    if tokens.size == 0:
        return tokens
    length = min(shingle_tokens, tokens.size)
    runs = np.zeros(tokens.size - length + 1, dtype=np.uint64)
    for offset in range(length):
        runs = _mixed(runs + tokens[offset : offset + runs.size])
    return np.unique(runs)


def _mixed(values: np.ndarray) -> np.ndarray:
    # The finaliser of splitmix64: a bijection, so that only the additions before it can collide.
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def _jaccard(first: Shingles, second: Shingles) -> float:
    both = np.intersect1d(first, second, assume_unique=True).size
    return both / max(first.size + second.size - both, 1)


class _Nearest:
    """Finds the test document that a text repeats."""

    def __init__(self, test: Sequence[Document], threshold: float, shingle_tokens: int) -> None:
        self._threshold, self._shingle_tokens = threshold, shingle_tokens
        self._hashes = _Hashes()
        self._names = [document.name for document in test]
        self._tests = [_shingles(d.text, shingle_tokens, self._hashes) for d in test]
        # Texts without any token have no shingles to compare.
        self._same_text = {document.text: document.name for document in reversed(test)}
        self._index: MinHashLSH | None = None
        bands_rows = _bands_and_rows(threshold)
        if bands_rows is not None:
            self._index = MinHashLSH(params=bands_rows, num_perm=_PERMUTATIONS)
            for position, shingles in enumerate(self._tests):
                if shingles.size:
                    self._index.insert(position, _minhash(shingles))

    def to(self, document: Document) -> Dropped | None:
        """The most similar test document, the first of equals; None below the threshold."""
        if document.text in self._same_text:
            return Dropped(document.name, self._same_text[document.text], 1.0)
        near = [(jaccard, -i) for i, jaccard in self.all_near(document).items()]
        jaccard, position = max(near, default=(0.0, 0))
        return Dropped(document.name, self._names[-position], jaccard) if near else None

    def all_near(self, document: Document) -> dict[int, float]:
        """Similarity of each test document, by place, that is at the threshold or above it."""
        shingles = _shingles(document.text, self._shingle_tokens, self._hashes)
        found = {i: _jaccard(shingles, self._tests[i]) for i in self._candidates(shingles)}
        return {i: jaccard for i, jaccard in found.items() if jaccard >= self._threshold}

    def _candidates(self, shingles: Shingles) -> list[int]:
        if shingles.size == 0:
            return []
        found: Iterable[int] = range(len(self._tests))
        if self._index is not None:
            found = cast("list[int]", self._index.query(_minhash(shingles)))
        return sorted(i for i in found if self._sizes_allow(shingles.size, self._tests[i].size))

    def _sizes_allow(self, first: int, second: int) -> bool:
        return min(first, second) >= self._threshold * max(first, second)


def _bands_and_rows(threshold: float) -> tuple[int, int] | None:
    """The most selective banding that still finds a pair at the threshold; None if none does."""
    for rows in range(_PERMUTATIONS // 2, 0, -1):
        bands = _PERMUTATIONS // rows
        if (1 - threshold**rows) ** bands <= _MISSED_PROBABILITY:
            return bands, rows
    return None


def _minhash(shingles: Shingles) -> MinHash:
    minhash = MinHash(num_perm=_PERMUTATIONS, seed=_SEED, hashfunc=int)
    values = (shingles >> np.uint64(32)).tolist()
    for start in range(0, len(values), _BATCH):
        minhash.update_batch(values[start : start + _BATCH])
    return minhash
