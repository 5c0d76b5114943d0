"""The search over a large memory, kept on disk and mapped: opened at once, in little RAM."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

import faiss
import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from trimtab.carriers.memory import CONTEXT_BYTES, Memory
from trimtab.carriers.search import (
    LISTED_ENTRIES,
    WIDENED_KEYS,
    Index,
    as_strings,
    build_index,
    empty_lists,
    list_centres,
    list_count,
    merged_byte_order,
)
from trimtab.store.files import writing_atomically
from trimtab.store.home import trimtab_home
from trimtab.store.streamed import Streamed, rows_of, save_streamed
from trimtab.types import Progress

VERSION = 2
"""Changes whenever the way in which an index is computed, or its layout, does."""

MOST_LISTED = 2
"""A memory that has grown keeps its lists until it asks for more than so many times as many: a
question then reads as large a share of the keys, in larger pieces."""

_COMPARED_KEYS = 8_192
"""Keys that are compared with every list's centre at once."""

_ENTRY_BYTES = 8


def index_path(keys_sha256: str) -> Path:
    """The file of an index, named by what decides its content.

    Args:
        keys_sha256: Fingerprint of the file that the memory's keys lie in.
    """
    asked = json.dumps([VERSION, keys_sha256])
    return trimtab_home() / "indexes" / f"{hashlib.sha256(asked.encode()).hexdigest()}.safetensors"


def kept_index(
    memory: Memory,
    path: Path | None,
    progress: Progress,
    earlier: Sequence[tuple[Path, int]] = (),
) -> Index:
    """The search over a memory; that of a large one is made once and then mapped.

    A small one is made in RAM in a moment. One that has grown keeps the lists that it had,
    unless it is many times as large.

    Args:
        memory: The memory.
        path: Where the index of a large one is kept; None where nothing is.
        progress: Counts entries whose lists are found.
        earlier: Where the index was kept before the memory grew, and the entries that it had,
            the latest first.

    Raises:
        StorageError: The disk is full or the folder cannot be written.
    """
    if path is None or len(memory) < LISTED_ENTRIES:
        return build_index(memory)
    index = read_index(path, memory)
    if index is None:
        write_index(path, memory, progress, lists_before(memory, earlier))
        index = read_index(path, memory)
    assert index is not None
    return index


@dataclass(frozen=True)
class Listed:
    """The index of a memory's first entries, as its file has it.

    Attributes:
        centres: Of the lists, shape [lists, key].
        list_ends: Keys in each list and in those before it, shape [lists].
        lists: For each list its keys, then their entries, as bytes, shape [bytes].
        contexts: The bytes before each entry in byte order, shape [entries, CONTEXT_BYTES].
        entries: The entry of each of `contexts`, shape [entries].
    """

    centres: Tensor
    list_ends: Tensor
    lists: Tensor
    contexts: Tensor
    entries: Tensor

    def __len__(self) -> int:
        """Number of entries."""
        return len(self.entries)


def no_entries(centres: Tensor) -> Listed:
    """Lists that hold no key yet.

    Args:
        centres: Shape [lists, key].
    """
    nothing = torch.zeros(0, dtype=torch.uint8)
    return Listed(
        centres,
        torch.zeros(len(centres), dtype=torch.int64),
        nothing,
        nothing.view(0, CONTEXT_BYTES),
        nothing.long(),
    )


def write_index(
    path: Path, memory: Memory, progress: Progress, listed: Listed | None = None
) -> None:
    """Make the index of a memory and keep it, atomically.

    Keys of a list lie side by side, so that a search reads few and large pieces; each list is
    followed by the entries of its keys, as faiss reads lists from a file. What is written is never
    in RAM as a whole. Entries that are listed already are copied, list by list; the others alone
    are looked at.

    Args:
        path: The file to write.
        memory: The memory.
        progress: Counts entries whose lists are found.
        listed: The index of the first entries; None where all are listed anew.

    Raises:
        StorageError: The disk is full or the folder cannot be written.
    """
    if listed is None:
        listed = no_entries(list_centres(memory.keys))
    keys = memory.keys[len(listed) :]
    places = _places(keys, listed.centres, progress)
    counts = torch.bincount(places, minlength=len(listed.centres))
    contexts, entries = merged_byte_order(memory, as_strings(listed.contexts), listed.entries)
    size = len(memory) * _row_bytes(memory.keys.shape[1])
    tensors = {
        "centres": rows_of([listed.centres]),
        "list_ends": rows_of([listed.list_ends + counts.cumsum(0)]),
        "lists": Streamed(torch.uint8, (size,), _grown_lists(listed, keys, places, counts)),
        "contexts": rows_of([_as_bytes(contexts)]),
        "entries": rows_of([entries]),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    with writing_atomically(path) as temp:
        save_streamed(temp, tensors)


def lists_before(memory: Memory, earlier: Sequence[tuple[Path, int]]) -> Listed | None:
    """The index of a memory before it grew, if it is kept and its lists are still enough."""
    for path, entries in earlier:
        smaller = replace(memory, keys=memory.keys[:entries])
        try:
            found = load_file(path)
            _check(found, smaller)
        except (FileNotFoundError, SafetensorError, KeyError, ValueError):
            continue
        if list_count(len(memory)) <= MOST_LISTED * len(found["centres"]):
            return Listed(**{field.name: found[field.name] for field in fields(Listed)})
    return None


def _places(keys: Tensor, centres: Tensor, progress: Progress) -> Tensor:
    """The list of each key, shape [entries]."""
    found = []
    with progress("listing the memory's keys (entries)", len(keys)) as advance:
        for part in keys.split(WIDENED_KEYS):
            found += [(some.float() @ centres.T).argmax(-1) for some in part.split(_COMPARED_KEYS)]
            advance(len(part))
    return torch.cat(found)


def _grown_lists(listed: Listed, keys: Tensor, places: Tensor, counts: Tensor) -> Iterator[Tensor]:
    """For each list its keys, then their entries; new ones lie behind those that were there.

    Args:
        listed: What was there.
        keys: Of the entries from its last on, shape [new entries, key].
        places: The list of each, shape [new entries].
        counts: How many of them come to each list, shape [lists].
    """
    key_bytes, row = 2 * keys.shape[1], _row_bytes(keys.shape[1])
    order, first = places.sort(stable=True).indices, 0
    for end, new in zip(listed.list_ends.tolist(), order.split(counts.tolist()), strict=True):
        there = listed.lists[first * row : end * row]
        middle = (end - first) * key_bytes
        yield from (there[:middle], keys[new], there[middle:], new + len(listed))
        first = end


def _row_bytes(key_size: int) -> int:
    """A key in float16 and its entry."""
    return 2 * key_size + _ENTRY_BYTES


def _as_bytes(contexts: np.ndarray) -> Tensor:
    return torch.from_numpy(contexts.view(np.uint8)).reshape(-1, CONTEXT_BYTES)


def read_index(path: Path, memory: Memory) -> Index | None:
    """Map the index of a memory; None where there is none, or a file that is to be made anew.

    Args:
        path: Where it is kept.
        memory: The memory.
    """
    try:
        found = load_file(path)
        _check(found, memory)
        lists = _mapped_lists(path, found["list_ends"], found["centres"])
    except (FileNotFoundError, SafetensorError, KeyError, ValueError):
        return None
    return Index(lists, as_strings(found["contexts"]), found["entries"])


def _check(found: dict[str, Tensor], memory: Memory) -> None:
    entries, size = memory.keys.shape
    ends, counts = found["list_ends"], found["list_ends"].diff()
    shapes = {
        "centres": (torch.float32, (len(ends), size)),
        "list_ends": (torch.int64, (len(ends),)),
        "lists": (torch.uint8, (entries * _row_bytes(size),)),
        "contexts": (torch.uint8, (entries, CONTEXT_BYTES)),
        "entries": (torch.int64, (entries,)),
    }
    wrong = [name for name, told in shapes.items() if _told(found[name]) != told]
    if wrong or not len(ends) or ends[0] < 0 or (counts < 0).any() or ends[-1] != entries:
        raise ValueError(f"no index of {entries} entries: {wrong or 'list_ends'}")


def _told(tensor: Tensor) -> tuple[torch.dtype, tuple[int, ...]]:
    return tensor.dtype, tuple(tensor.shape)


def _mapped_lists(path: Path, ends: Tensor, centres: Tensor) -> faiss.IndexIVF:
    index = empty_lists(centres)
    lists = faiss.OnDiskInvertedLists(index.nlist, index.code_size, str(path))
    start, row = _offset(path, "lists"), index.code_size + _ENTRY_BYTES
    table = faiss.OnDiskOneListVector()  # pyright: ignore[reportAttributeAccessIssue]
    one, first = faiss.OnDiskOneList(), 0
    for end in ends.tolist():
        one.size = one.capacity = end - first
        one.offset = start + first * row
        table.push_back(one)
        first = end
    lists.lists, lists.read_only, lists.totsize = table, True, path.stat().st_size
    # Its threads, made anew for each question, cost more than pages that are there already.
    lists.prefetch_nthread = 0
    lists.do_mmap()
    index.replace_invlists(lists, True)
    lists.this.disown()  # pyright: ignore[reportAttributeAccessIssue]
    index.ntotal = first
    return index


def _offset(path: Path, name: str) -> int:
    """Where in a safetensors file a tensor's bytes begin."""
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        return 8 + length + json.loads(file.read(length))[name]["data_offsets"][0]
