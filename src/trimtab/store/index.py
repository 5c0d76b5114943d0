"""The search over a large memory, kept on disk and mapped: opened at once, in little RAM."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import faiss
import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from trimtab.carriers.memory import CONTEXT_BYTES, Memory
from trimtab.carriers.search import (
    LISTED_ENTRIES,
    WIDENED_KEYS,
    Index,
    as_strings,
    build_index,
    byte_order,
    empty_lists,
    list_centres,
    list_count,
)
from trimtab.store.files import writing_atomically
from trimtab.store.home import trimtab_home
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
    """Which list each key is in.

    Attributes:
        centres: Of the lists, shape [lists, key].
        places: The list of each of the first entries, shape [entries].
    """

    centres: Tensor
    places: Tensor


def write_index(
    path: Path, memory: Memory, progress: Progress, listed: Listed | None = None
) -> None:
    """Make the index of a memory and keep it, atomically.

    Keys of a list lie side by side, so that a search reads few and large pieces; each list is
    followed by the entries of its keys, as faiss reads lists from a file. What is written is never
    in RAM as a whole.

    Args:
        path: The file to write.
        memory: The memory.
        progress: Counts entries whose lists are found.
        listed: Lists that the first entries are in already; None where all are found anew.

    Raises:
        StorageError: The disk is full or the folder cannot be written.
    """
    if listed is None:
        listed = Listed(list_centres(memory.keys), torch.zeros(0, dtype=torch.long))
    centres = listed.centres
    more = _places(memory.keys[len(listed.places) :], centres, progress)
    places = torch.cat([listed.places, more])
    ends = torch.bincount(places, minlength=len(centres)).cumsum(0)
    contexts, entries = byte_order(memory)
    path.parent.mkdir(parents=True, exist_ok=True)
    with writing_atomically(path) as temp:
        lists = _lists_on_disk(temp.with_name("lists"), memory.keys, places, ends)
        tensors = {
            "centres": centres,
            "list_ends": ends,
            "lists": lists,
            "contexts": torch.from_numpy(contexts.view(np.uint8)).reshape(-1, CONTEXT_BYTES),
            "entries": entries,
        }
        save_file(tensors, temp)
        temp.with_name("lists").unlink()


def lists_before(memory: Memory, earlier: Sequence[tuple[Path, int]]) -> Listed | None:
    """The lists of a memory before it grew, if they are kept and there are still enough."""
    for path, entries in earlier:
        smaller = replace(memory, keys=memory.keys[:entries])
        try:
            found = load_file(path)
            _check(found, smaller)
            places = _places_in(found, memory.keys.shape[1])
        except (FileNotFoundError, SafetensorError, KeyError, ValueError, IndexError):
            continue
        if list_count(len(memory)) <= MOST_LISTED * len(found["centres"]):
            return Listed(found["centres"], places)
    return None


def _places_in(found: dict[str, Tensor], key_size: int) -> Tensor:
    """The list of each entry in an index as it is kept, shape [entries]."""
    ends = found["list_ends"].tolist()
    places = torch.zeros(ends[-1], dtype=torch.long)
    row, first = 2 * key_size + _ENTRY_BYTES, 0
    for place, end in enumerate(ends):
        block = found["lists"][first * row : end * row]
        entries = block[(end - first) * 2 * key_size :].clone().view(torch.int64)
        places[entries] = place
        first = end
    return places


def _places(keys: Tensor, centres: Tensor, progress: Progress) -> Tensor:
    """The list of each key, shape [entries]."""
    found = []
    with progress("listing the memory's keys (entries)", len(keys)) as advance:
        for part in keys.split(WIDENED_KEYS):
            found += [(some.float() @ centres.T).argmax(-1) for some in part.split(_COMPARED_KEYS)]
            advance(len(part))
    return torch.cat(found)


def _lists_on_disk(scratch: Path, keys: Tensor, places: Tensor, ends: Tensor) -> Tensor:
    """For each list its keys, then their entries, as bytes of a mapped file."""
    order = places.sort(stable=True).indices
    with open(scratch, "wb") as file:
        for entries in order.tensor_split(ends[:-1]):
            file.write(keys[entries].numpy().tobytes())
            file.write(entries.numpy().tobytes())
    size = scratch.stat().st_size
    return torch.from_file(str(scratch), shared=False, size=size, dtype=torch.uint8)


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
        "lists": (torch.uint8, (entries * (2 * size + _ENTRY_BYTES),)),
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
