"""Entries of new text for a memory that is there already: the reference reads it, in shards."""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from trimtab.backends.hf import HFModel
from trimtab.carriers.memory import Memory, unit_keys
from trimtab.carriers.sources import travelling_names
from trimtab.fitting.memory import entries_of
from trimtab.processes import Piece, do_pieces, process_count
from trimtab.soft_targets import passage_columns, run_reference
from trimtab.store.files import writing_atomically
from trimtab.text.passages import DocumentTokens, Passage, cut_shards, rows_of
from trimtab.types import Advance, Progress

SHARD_TOKENS = 8_192
"""Tokens whose keys are made and kept together: what an interrupted run reads again at most."""

_VERSION = 1
"""Changes whenever keys are computed in another way."""


@dataclass(frozen=True)
class Windows:
    """How text is cut for the reference: tokens that it reads at once, and new ones among them."""

    window: int
    stride: int


def new_entries(
    base: HFModel,
    memory: Memory,
    documents: Sequence[DocumentTokens],
    windows: Windows,
    folder: Path,
    progress: Progress,
) -> Memory:
    """Entries of new documents, under the whitening of a memory that they are to be appended to.

    Args:
        base: The reference, which made the memory's keys.
        memory: The memory.
        documents: In the reference's tokens, two at least each.
        windows: How they are cut.
        folder: Where keys are kept until all are there; what a run that was interrupted has left
            of the same text is used.
        progress: Counts tokens.

    Raises:
        NumericalError: A hidden state that is not a finite number.
        StorageError: The disk is full or the folder cannot be written.
    """
    shards = cut_shards(
        documents, window=windows.window, stride=windows.stride, shard_tokens=SHARD_TOKENS
    )
    made_by = [_VERSION, base.fingerprint, base.model.dtype, memory.projection.sum().item()]
    paths = [folder / _file_name(made_by, documents, shard) for shard in shards]
    _remove_others(folder, paths)
    with progress("reading the new text (tokens)", sum(map(rows_of, shards))) as advance:
        missing = []
        for path, shard in zip(paths, shards, strict=True):
            if path.is_file():
                # Keys appear whole, or not at all.
                advance(rows_of(shard))
            else:
                write = _writer(base, memory, documents, shard, path)
                missing.append(Piece(write, rows_of(shard)))
        do_pieces(missing, advance, process_count([rows_of(shard) for shard in shards], None))
    columns = [passage_columns(documents, shard) for shard in shards]
    whole = {name: torch.cat([part[name] for part in columns]) for name in columns[0]}
    keys = torch.cat([_read(path) for path in paths])[whole["next_ids"] >= 0]
    names = travelling_names([document.name for document in documents])
    return entries_of(base.vocabulary, whole, keys, names)


def _writer(
    base: HFModel,
    memory: Memory,
    documents: Sequence[DocumentTokens],
    shard: Sequence[Passage],
    path: Path,
) -> Callable[[Advance], None]:
    def write(advance: Advance) -> None:
        states = run_reference(base, documents, shard, advance=advance)
        keys = unit_keys(states.cpu(), memory.projection, memory.mean)
        with writing_atomically(path) as temp:
            save_file({"keys": keys}, temp)

    return write


def _file_name(
    made_by: Sequence[object], documents: Sequence[DocumentTokens], shard: Sequence[Passage]
) -> str:
    digest = hashlib.sha256(json.dumps([str(each) for each in made_by]).encode())
    for passage in shard:
        digest.update(json.dumps([passage.record_from - passage.start, passage.rows]).encode())
        ids = documents[passage.document_index].token_ids[passage.start : passage.end]
        digest.update(ids.tobytes())
    return f"{digest.hexdigest()}.safetensors"


def _read(path: Path) -> Tensor:
    return load_file(path)["keys"]


def _remove_others(folder: Path, paths: Sequence[Path]) -> None:
    """What was kept of other text, or is broken, is of no use."""
    for path in folder.glob("*.safetensors"):
        if path not in paths or not _is_whole(path):
            path.unlink(missing_ok=True)


def _is_whole(path: Path) -> bool:
    try:
        _read(path)
    except (SafetensorError, KeyError):
        return False
    return True
