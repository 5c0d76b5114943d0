"""Scored documents on disk, so that a measurement goes on where it was interrupted."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from trimtab.metrics import DocumentScore
from trimtab.steering.scoring import RowScore, ScoredDocument
from trimtab.store.files import writing_atomically

VERSION = 19
"""Changes whenever scores mean something else or are computed in another way."""

_COLUMNS = tuple(field.name for field in fields(RowScore))


@dataclass(frozen=True)
class Kept:
    """A document's scores.

    Attributes:
        on_host: Every row that lives on the host.
        small: Reference and expert alone.
    """

    on_host: ScoredDocument
    small: Mapping[str, DocumentScore]


def write_scores(path: Path, kept: Kept) -> None:
    """Keep a document's scores, atomically.

    Raises:
        StorageError: The disk is full or the folder cannot be written.
    """
    tensors = {
        "token_ids": torch.tensor(kept.on_host.token_ids, dtype=torch.int32),
        "sizes": torch.tensor(kept.on_host.sizes, dtype=torch.int32),
    }
    for row, score in kept.on_host.rows.items():
        tensors |= {f"{row}/{name}": getattr(score, name) for name in _COLUMNS}
    for row, small in kept.small.items():
        numbers = (small.nll_nats, small.scored_bytes)
        tensors[f"{row}/alone"] = torch.tensor(numbers, dtype=torch.float64)
    path.parent.mkdir(parents=True, exist_ok=True)
    with writing_atomically(path) as temp:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temp)


def read_scores(path: Path) -> Kept | None:
    """Scores kept before; None where there are none, or a broken file that is made anew."""
    try:
        return _kept(load_file(path))
    except (FileNotFoundError, SafetensorError, KeyError):
        return None


def _kept(found: Mapping[str, Tensor]) -> Kept:
    parts = [name.rpartition("/") for name in found]
    rows = dict.fromkeys(row for row, _, column in parts if column in _COLUMNS)
    on_host = ScoredDocument(
        tuple(found["token_ids"].tolist()),
        tuple(found["sizes"].tolist()),
        {row: RowScore(*(found[f"{row}/{name}"] for name in _COLUMNS)) for row in rows},
    )
    small = {
        row: DocumentScore(float(found[f"{row}/alone"][0]), int(found[f"{row}/alone"][1]))
        for row, _, column in parts
        if column == "alone"
    }
    return Kept(on_host, small)
