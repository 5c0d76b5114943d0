"""Which positions of a corpus are run together: windows of documents, gathered into shards."""

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from trimtab.text.corpus import scored_windows
from trimtab.types import Document


@dataclass(frozen=True)
class DocumentTokens:
    """A document as token ids.

    Attributes:
        name: Name of the document.
        token_ids: At least one, int32, shape [tokens].
    """

    name: str
    token_ids: NDArray[np.int32]


@dataclass(frozen=True)
class Passage:
    """A stretch of one document that is run at once.

    Attributes:
        document_index: Which document of the split.
        start: First position that is run.
        record_from: First position that is recorded; those before are context.
        end: One past the last position.
    """

    document_index: int
    start: int
    record_from: int
    end: int

    @property
    def rows(self) -> int:
        """Recorded positions."""
        return self.end - self.record_from


def tokenised(
    documents: Sequence[Document],
    encode: Callable[[Document], Sequence[int]],
    *,
    max_tokens: int | None,
    seed: int,
) -> list[DocumentTokens]:
    """Turn documents into token ids, up to a number of tokens in all.

    Under a limit, documents are taken in an order drawn by the seed, so that the first names of
    a folder are not all that is seen, and each may first fill a sixteenth of the limit only, so
    that one long document is not all either. What they give is their beginning; the result is
    in corpus order. Documents without a token are passed over.

    Args:
        documents: The corpus.
        encode: Gives a document's token ids.
        max_tokens: Most tokens in all; None takes everything.
        seed: Decides the order under a limit.
    """
    order = list(range(len(documents)))
    if max_tokens is not None:
        random.Random(seed).shuffle(order)
    share = None if max_tokens is None else max(1, max_tokens // 16)
    token_ids: dict[int, NDArray[np.int32]] = {}
    taken: dict[int, int] = {}
    total = 0
    for index in order:
        if max_tokens is not None and total >= max_tokens:
            break
        token_ids[index] = np.asarray(encode(documents[index]), dtype=np.int32)
        taken[index] = len(token_ids[index][:share])
        total += taken[index]
    kept = _filled(taken, {index: len(ids) for index, ids in token_ids.items()}, max_tokens)
    return [
        DocumentTokens(documents[index].name, token_ids[index][: kept[index]])
        for index in sorted(kept)
        if kept[index]
    ]


def _filled(
    taken: Mapping[int, int], lengths: Mapping[int, int], max_tokens: int | None
) -> dict[int, int]:
    """Lengthen the first documents until the limit is reached, or cut the last one to it."""
    if max_tokens is None:
        return dict(taken)
    left = max_tokens - sum(taken.values())
    kept = dict(taken)
    for index in reversed(taken) if left < 0 else taken:
        change = max(-taken[index], left) if left < 0 else min(lengths[index] - taken[index], left)
        kept[index] += change
        left -= change
    return kept


def passages(n_tokens: int, window: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """Cut a document so that each position is recorded exactly once.

    Args:
        n_tokens: Length of the document.
        window: Most positions run at once.
        stride: Most positions recorded at once, apart from the first time.

    Yields:
        start, record_from and end; at least window - stride positions lie before record_from,
        except at the document's start.
    """
    # Recording position i means predicting token i + 1, so the windows in which each token is
    # predicted once are those of a text that is one token longer at either end.
    for part in scored_windows(n_tokens + 1, window + 1, stride):
        yield part.start, part.score_from - 1, part.end - 1


def cut_shards(
    documents: Sequence[DocumentTokens], *, window: int, stride: int, shard_tokens: int
) -> list[list[Passage]]:
    """Gather passages into shards of at most `shard_tokens` recorded positions.

    Shards are about as few as that allows and nearly equal, so that processes that share them
    end together. A passage is never divided, so a single one may exceed the limit.

    Args:
        documents: The split.
        window: Most positions run at once.
        stride: Most positions recorded at once, apart from a document's first passage.
        shard_tokens: Recorded positions in a shard.
    """
    cut = [
        Passage(index, start, record_from, end)
        for index, document in enumerate(documents)
        for start, record_from, end in passages(len(document.token_ids), window, stride)
    ]
    count = max(1, -(-rows_of(cut) // shard_tokens))
    shards = _dealt(cut, count)
    # It ends: passages that together exceed the limit have their middles half of it apart.
    while any(len(shard) > 1 and rows_of(shard) > shard_tokens for shard in shards):
        count += 1 + count // 20
        shards = _dealt(cut, count)
    return shards


def rows_of(shard: Sequence[Passage]) -> int:
    """Recorded positions of some passages."""
    return sum(passage.rows for passage in shard)


def _dealt(cut: Sequence[Passage], count: int) -> list[list[Passage]]:
    """Each passage where its middle falls, the whole being divided into equal lengths."""
    whole, before = rows_of(cut), 0
    shards: dict[int, list[Passage]] = {}
    for passage in cut:
        middle = 2 * before + passage.rows
        shards.setdefault(middle * count // (2 * whole), []).append(passage)
        before += passage.rows
    return list(shards.values())
