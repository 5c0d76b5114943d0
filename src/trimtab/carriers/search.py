"""Finding entries of a memory: by the state that asks, and by the bytes before the question.

A nearest-neighbour language model (Khandelwal et al. 2020) is joined with a search for the longest
common context, as in an n-gram model without a bound on n. Neither is enough: a state finds what
means the same, but crosses to another model through a map that blurs it; bytes need no map, but
know only what was said before in the same words.
"""

import math
from dataclasses import dataclass, replace
from typing import Any, Literal

import faiss
import numpy as np
import torch
from torch import Tensor

from trimtab.carriers.memory import CONTEXT_BYTES, Memory, contexts_before

Finds = Literal["both", "state", "bytes"]
"""What entries are found by."""

NEIGHBOURS = 128
"""Entries found by the state."""

BYTE_NEIGHBOURS = 64
"""Entries found by the bytes before them."""

TEMPERATURE = 0.1
MAPPED_MATCH_WEIGHT = 0.8
"""A byte more in common counts like so much times TEMPERATURE more cosine."""

OWN_MATCH_WEIGHT = 0.3
"""The same where the state that asks is of the model that made the keys: no map has blurred it,
so that it can be trusted further against the bytes."""


LISTED_ENTRIES = 131_072
"""From here on keys are searched by lists of those near each other: comparing each with all of a
million keys would read 0.8 GB a question."""

PROBED_SHARE = 8
"""One of so many lists is looked into; more find little more, and take as much longer."""

COMPARED_QUESTIONS = 64
"""Questions that are compared with every key at once."""

WIDENED_KEYS = 65_536
"""Entries that are worked on at once: in float32 keys take twice the room."""

_KMEANS_STEPS = 10
_KMEANS_POINTS = 64
"""Keys that each list's centre is found from, at most."""


@dataclass(frozen=True)
class Index:
    """Search over a memory's entries.

    Attributes:
        keys: All keys in float32, shape [all entries, key], which each question is compared with;
            from LISTED_ENTRIES on lists of them.
        contexts: The bytes before each entry, last byte first, in byte order, shape [entries].
        entries: The entry of each of `contexts`, shape [entries].
        kept: Which of all entries are found at all, shape [all entries]; None for every one.
            `contexts` and `entries` then are of those, `keys` of all.
    """

    keys: Tensor | faiss.IndexIVF
    contexts: np.ndarray
    entries: Tensor
    kept: Tensor | None = None

    def only(self, kept: Tensor) -> "Index":
        """A search that passes over the other entries; nothing is built anew.

        Args:
            kept: True for entries that are found if they were before, shape [all entries].
        """
        kept = kept if self.kept is None else kept & self.kept
        stays = kept[self.entries]
        return replace(
            self, contexts=self.contexts[stays.numpy()], entries=self.entries[stays], kept=kept
        )


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


def build_index(memory: Memory) -> Index:
    """Prepare both searches, in RAM.

    Keys are searched by lists from LISTED_ENTRIES on, bytes always exactly.
    """
    keys = listed_keys(memory.keys) if len(memory) >= LISTED_ENTRIES else memory.keys.float()
    return Index(keys, *byte_order(memory))


def nearest_keys(
    keys: Tensor, questions: Tensor, count: int, *, kept: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Compare each question with every key.

    By torch's products this takes 0.7 to 0.9 of what faiss' flat index takes for one question, and
    a half to an eighth for 64 (bench/results/2026-11-27-exact-search.json).

    Args:
        keys: Unit vectors, shape [entries, key].
        questions: Unit vectors, shape [questions, key].
        count: How many to find.
        kept: As in `Index`.

    Returns:
        Entries and their cosines, the nearest first, each of shape [questions, count].
    """
    found = []
    for some in questions.split(COMPARED_QUESTIONS):
        cosines = some @ keys.T
        if kept is not None:
            cosines.masked_fill_(~kept, -torch.inf)
        found.append(cosines.topk(count, -1))
    return torch.cat([top.indices for top in found]), torch.cat([top.values for top in found])


def listed_keys(keys: Tensor) -> faiss.IndexIVF:
    """Compare each question with the keys in the nearest lists alone.

    An inverted file (Sivic and Zisserman 2003), as faiss makes it, of about as many lists as keys
    in each, which together are the fewest to compare with. Keys stay in float16, as memories have
    them. Of what the exact search weighs it found 94.5 % on text, which cost as many bits by either
    (bench/memory_lists.py).

    Args:
        keys: Unit vectors, shape [entries, key].
    """
    index = empty_lists(list_centres(keys))
    for part in keys.split(WIDENED_KEYS):
        index.add(part.float().numpy())  # pyright: ignore[reportCallIssue]
    return index


def list_count(entries: int) -> int:
    """Lists for so many keys: about as many as keys in each."""
    return 2 ** round(math.log2(entries) / 2)


def list_centres(keys: Tensor) -> Tensor:
    """The centres of the lists of a memory's keys, by k-means over a part of them.

    The same keys give the same centres.

    Args:
        keys: Unit vectors, shape [entries, key].

    Returns:
        Unit vectors in float32, shape [lists, key].
    """
    entries, size = keys.shape
    lists = list_count(entries)
    index = _lists(size, lists)
    index.cp.spherical, index.cp.niter = True, _KMEANS_STEPS
    index.cp.max_points_per_centroid = _KMEANS_POINTS
    sample = keys[:: max(1, entries // (lists * _KMEANS_POINTS))]
    index.train(sample.float().numpy())  # pyright: ignore[reportCallIssue]
    return torch.from_numpy(index.quantizer.reconstruct_n(0, lists))  # pyright: ignore


def empty_lists(centres: Tensor) -> faiss.IndexIVFScalarQuantizer:
    """A search by lists that hold no keys yet; a question looks into one in PROBED_SHARE."""
    lists, size = centres.shape
    index = _lists(size, lists)
    index.quantizer.add(centres.numpy())  # pyright: ignore[reportCallIssue]
    index.is_trained = True
    index.nprobe = lists // PROBED_SHARE
    return index


def _lists(size: int, lists: int) -> faiss.IndexIVFScalarQuantizer:
    kind, measure = faiss.ScalarQuantizer.QT_fp16, faiss.METRIC_INNER_PRODUCT
    # By residue, keys would be rounded again, and centres be read with each.
    return faiss.IndexIVFScalarQuantizer(faiss.IndexFlatIP(size), size, lists, kind, measure, False)


def byte_order(memory: Memory, first: int = 0) -> tuple[np.ndarray, Tensor]:
    """The bytes before each entry in byte order, and the entries in that order: as in Index.

    Args:
        memory: The memory.
        first: Of entries from this one on alone.
    """
    parts = memory.positions[first:].split(WIDENED_KEYS)
    contexts = as_strings(torch.cat([contexts_before(memory.text, part) for part in parts]))
    order = np.argsort(contexts, kind="stable")
    return contexts[order], torch.from_numpy(order + first)


def merged_byte_order(
    memory: Memory, contexts: np.ndarray, entries: Tensor
) -> tuple[np.ndarray, Tensor]:
    """`byte_order` of a memory that has grown: the new entries alone are sorted.

    Args:
        memory: The memory as it is now.
        contexts: `byte_order` of its first entries, shape [first entries].
        entries: The same.
    """
    more, numbers = byte_order(memory, len(entries))
    # A stable sort puts the later of two that are alike behind.
    places = np.searchsorted(contexts, more, side="right")
    merged = np.insert(entries.numpy(), places, numbers.numpy())
    return np.insert(contexts, places, more), torch.from_numpy(merged)


def look_up(
    memory: Memory,
    index: Index,
    features: Tensor | None,
    contexts: Tensor,
    match_weight: Tensor,
    *,
    finds: Finds = "both",
) -> Found:
    """Find the entries nearest to each question and weigh them.

    weight ~ exp(cosine / TEMPERATURE + match_weight * matched bytes), over the NEIGHBOURS entries
    with the nearest states and the BYTE_NEIGHBOURS entries with the longest common context; an
    entry that both find counts once. By bytes alone there is no cosine.

    Args:
        memory: The memory.
        index: Over its entries.
        features: Whitened states of the questions, shape [questions, key]; None where entries are
            found by bytes.
        contexts: Bytes before each question, last first, [questions, CONTEXT_BYTES].
        match_weight: What a matched byte counts, shape [questions].
        finds: What entries are found by.
    """
    parts: list[tuple[Tensor, Tensor]] = []
    if features is not None and finds != "bytes":
        parts.append(_by_state(index, features))
    if finds != "state":
        alike = _by_bytes(memory, index, contexts)
        cosines = torch.zeros(alike.shape)
        if parts and features is not None:
            # What both find counts once.
            again = (alike[:, :, None] == parts[0][0][:, None]).any(-1)
            cosines = _cosines(memory, alike, features).masked_fill(again, -torch.inf)
        parts.append((alike, cosines))
    entries, cosines = (torch.cat(side, 1) for side in zip(*parts, strict=True))
    matched = _matched_bytes(memory, entries, contexts)
    scores = cosines / TEMPERATURE + match_weight[:, None] * matched
    return Found(entries, scores.softmax(-1), matched)


def _by_state(index: Index, features: Tensor) -> tuple[Tensor, Tensor]:
    """The entries with the nearest states, and their cosines."""
    unit = torch.nn.functional.normalize(features.float(), dim=-1)
    keys, count = index.keys, min(NEIGHBOURS, len(index.entries))
    if isinstance(keys, Tensor):
        return nearest_keys(keys, unit, count, kept=index.kept)
    questions = np.ascontiguousarray(unit.numpy())
    cosines, entries = keys.search(  # pyright: ignore[reportCallIssue]
        questions, count, params=_options(index, keys.nprobe)
    )
    if (entries < 0).any():
        # The nearest lists hold too few of the entries that are kept.
        cosines, entries = keys.search(  # pyright: ignore[reportCallIssue]
            questions, count, params=_options(index, keys.nlist)
        )
    return torch.from_numpy(entries), torch.from_numpy(cosines)


def _options(index: Index, probed: int) -> faiss.SearchParameters:
    """Passes over what is not kept, and looks into so many lists."""
    found: dict[str, Any] = {"nprobe": probed}
    if index.kept is not None:
        kept = np.packbits(index.kept.numpy(), bitorder="little")
        found["sel"] = faiss.IDSelectorBitmap(kept)  # pyright: ignore[reportCallIssue]
    return faiss.SearchParametersIVF(**found)


def _cosines(memory: Memory, entries: Tensor, features: Tensor) -> Tensor:
    questions = torch.nn.functional.normalize(features.float(), dim=-1)
    return torch.einsum("qnk,qk->qn", memory.keys[entries].float(), questions)


def _by_bytes(memory: Memory, index: Index, contexts: Tensor) -> Tensor:
    """In byte order the entries with the longest common context lie around the question's own.

    Where more have the question's own than are looked for, these are spread evenly over them, the
    first and the last among them: equal contexts lie in the order of the text, so that the last
    are what was appended.
    """
    some, asked = len(index.entries), as_strings(contexts)
    count = min(BYTE_NEIGHBOURS, some)
    place = torch.from_numpy(np.searchsorted(index.contexts, asked, side="left"))
    end = torch.from_numpy(np.searchsorted(index.contexts, asked, side="right"))
    room = min(2 * count, some)
    first = (place - count).clamp(0, some - room)
    around = index.entries[first[:, None] + torch.arange(room)]
    longest = first[:, None] + _matched_bytes(memory, around, contexts).topk(count, dim=1).indices
    equal = (end - place)[:, None]
    spread = place[:, None] + torch.arange(count) * (equal - 1) // max(1, count - 1)
    return index.entries[torch.where(equal > count, spread, longest)]


def _matched_bytes(memory: Memory, entries: Tensor, contexts: Tensor) -> Tensor:
    before = contexts_before(memory.text, memory.positions[entries.flatten()])
    agree = before.view(*entries.shape, CONTEXT_BYTES) == contexts[:, None]
    # Nothing before a text is no agreement.
    agree &= contexts[:, None] != 0
    return agree.to(torch.uint8).cumprod(-1).sum(-1)


def as_strings(contexts: Tensor) -> np.ndarray:
    """Rows of bytes as values that numpy can sort; zeros at the end count for nothing."""
    return np.ascontiguousarray(contexts.numpy()).view(f"S{CONTEXT_BYTES}")[:, 0]
