"""Entries of new text for a memory that is there already: the reference reads it, in pieces."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from trimtab.backends.hf import HFModel
from trimtab.carriers.memory import Memory, sources_of
from trimtab.carriers.sources import Sources, travelling_names
from trimtab.fitting.memory import entries_of
from trimtab.fitting.recorded import Columns
from trimtab.steering.host_states import HostStates, states_of
from trimtab.store.files import writing_atomically
from trimtab.store.home import trimtab_home
from trimtab.types import Advance, Document, Progress

PIECE_TOKENS = 8_192
"""Tokens that are read and kept together: what an interrupted run has to read again at most, but
for a document that is longer."""

_VERSION = 1
"""Changes whenever entries are computed in another way."""


@dataclass(frozen=True)
class Piece:
    """Documents whose entries are made and kept together.

    Attributes:
        token_ids: Of each document, in the reference's tokens.
        path: Where their entries are kept until all are there.
    """

    token_ids: tuple[tuple[int, ...], ...]
    path: Path

    @property
    def tokens(self) -> int:
        """Of all its documents."""
        return sum(map(len, self.token_ids))


def cut_pieces(base: HFModel, memory_sha256: str, documents: Sequence[Document]) -> list[Piece]:
    """Cut documents into pieces; documents without two tokens in a row give no entries.

    Args:
        base: The reference.
        memory_sha256: Fingerprint of the file of the memory that the entries are for.
        documents: The new text.
    """
    pieces: list[list[tuple[int, ...]]] = []
    room = 0
    for document in documents:
        ids = tuple(base.encode(document.text, markup=document.markup))
        if not pieces or len(ids) > room:
            pieces.append([])
            room = PIECE_TOKENS
        pieces[-1].append(ids)
        room -= len(ids)
    made_by = [_VERSION, memory_sha256, str(base.fingerprint), str(base.model.dtype)]
    return [Piece(tuple(each), _kept_path(made_by, each)) for each in pieces]


def read_pieces(
    base: HFModel,
    memory: Memory,
    documents: Sequence[Document],
    pieces: Sequence[Piece],
    progress: Progress,
) -> list[Memory]:
    """The entries of each piece, made now or by a run that was interrupted.

    Args:
        base: The reference, which made the memory's keys.
        memory: The memory that they are for.
        documents: What was cut into pieces.
        pieces: The pieces.
        progress: Counts tokens.

    Raises:
        StorageError: The disk is full or the folder cannot be written.
    """
    names, found = iter(travelling_names([one.name for one in documents])), []
    with progress("reading the new text (tokens)", sum(p.tokens for p in pieces)) as advance:
        for piece in pieces:
            named = [next(names) for _ in piece.token_ids]
            kept = _kept(piece, memory, named)
            if kept is None:
                states = states_of(base, piece.token_ids, "", _counted_by(advance))
                kept = entries_of(
                    base.vocabulary, _columns(states), memory.projection, memory.mean, named
                )
                _keep(piece, kept)
            else:
                advance(piece.tokens)
            found.append(kept)
    return found


def forget_pieces(pieces: Sequence[Piece]) -> None:
    """Remove what was kept of pieces whose entries have found their place."""
    for piece in pieces:
        piece.path.unlink(missing_ok=True)


def _kept_path(made_by: Sequence[object], token_ids: Sequence[Sequence[int]]) -> Path:
    asked = json.dumps([*made_by, token_ids]).encode()
    return trimtab_home() / "appending" / f"{hashlib.sha256(asked).hexdigest()}.safetensors"


def _keep(piece: Piece, entries: Memory) -> None:
    starts = torch.tensor(sources_of(entries).starts, dtype=torch.long)
    parts = {
        "keys": entries.keys,
        "text": entries.text,
        "positions": entries.positions,
        "starts": starts,
    }
    with writing_atomically(piece.path) as temp:
        save_file({name: tensor.contiguous() for name, tensor in parts.items()}, temp)


def _kept(piece: Piece, memory: Memory, names: Sequence[str]) -> Memory | None:
    try:
        found = load_file(piece.path)
        sources = Sources(tuple(names), tuple(found["starts"].tolist()))
        return Memory(
            found["keys"],
            memory.projection,
            memory.mean,
            found["text"],
            found["positions"],
            sources=sources,
        )
    except (FileNotFoundError, SafetensorError, KeyError):
        return None


def _columns(states: HostStates) -> Columns:
    index, following = states.document_index, states.token_ids.roll(-1)
    is_last = torch.ones(len(index), dtype=torch.bool)
    is_last[:-1] = index[1:] != index[:-1]
    return {
        "token_ids": states.token_ids,
        "next_ids": following.masked_fill(is_last, -1),
        "document_index": index,
        "reference_hidden": states.hidden,
    }


def _counted_by(advance: Advance) -> Progress:
    """A part of a larger piece of work, which counts for that."""

    @contextmanager
    def part(label: str, total: int) -> Iterator[Advance]:
        del label, total
        yield advance

    return part
