"""A recording on disk: shards of soft targets, written whole and read with every file checked."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, Literal, final

import torch
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from trimtab.compact import Precision, StateCode
from trimtab.encoding import unpack_samples, unpack_topk
from trimtab.errors import RecordingError
from trimtab.foretelling import Foretelling
from trimtab.store.adapter_schema import FileEntry
from trimtab.store.files import read_json, sha256_file, writing_atomically
from trimtab.store.recording_schema import (
    CODE_NAME,
    DOCUMENTS_NAME,
    FORMAT,
    FORMAT_VERSION,
    RECORD_AGAIN,
    UNEMBEDDING_NAME,
    CompactEncoding,
    MovedHead,
    RecordedDocument,
    RecordingManifest,
    SampledEncoding,
    ShardEntry,
    SparseEncoding,
    Split,
    read_recording_manifest,
)
from trimtab.stored_states import STATE_COLUMNS, unpack_states
from trimtab.unembedding import Unembedding

COMMON_COLUMNS = ("token_ids", "next_ids", "document_index", "reference_hidden")
"""Columns of every split in every encoding."""
_AS_STORED = (*COMMON_COLUMNS, "expert_hidden")
"""Columns that a reader gets as they lie in a shard."""
_TOPK = ("top_ids", "top_logprobs", "log_tail", "log_normaliser")
_SAMPLES = ("sample_ids", "sample_counts")
_COMPACT = ("numbers", "halvings", "unexpected_ids", "unexpected_levels")
_STORED_SAMPLES = ("sample_sizes", *_SAMPLES)
_STATES: dict[str, Literal["float16", "float32"]] = {"F16": "float16", "F32": "float32"}
_BROKEN = "delete that file and run the same `trimtab record` command again"


def column_names(encoding: str) -> tuple[str, ...]:
    """Columns that a reader gets from each encoding, one row a position.

    `token_ids` (the token read), `next_ids` (the same document's next, -1 at its end),
    `document_index` and `reference_hidden` are in all, and all that splits without the expert
    have. exact adds `expert_hidden`; sparse adds, each for `expert_` and `reference_`, `top_ids`,
    `top_logprobs`, `log_tail` and `log_normaliser`; sampled adds `expert_sample_ids` and
    `expert_sample_counts`; compact adds `expert_numbers`, `expert_halvings`,
    `expert_unexpected_ids` and `expert_unexpected_levels`, of which `trimtab.compact` makes states.
    """
    own = {
        "exact": ("expert_hidden",),
        "sparse": tuple(f"{who}_{name}" for who in ("expert", "reference") for name in _TOPK),
        "sampled": tuple(f"expert_{name}" for name in _SAMPLES),
        "compact": tuple(f"expert_{name}" for name in _COMPACT),
    }
    return (*COMMON_COLUMNS, *own[encoding])


def write_shard(path: Path, columns: Mapping[str, Tensor]) -> None:
    """Write one shard, whole or not at all; equal content gives equal bytes.

    Args:
        path: The file.
        columns: What is stored.

    Raises:
        StorageError: The disk is full or the path cannot be written.
    """
    contiguous = {name: column.cpu().contiguous() for name, column in columns.items()}
    # One metadata key only: safetensors writes several in an order that changes from run to run.
    with writing_atomically(path) as temp:
        save_file(contiguous, temp, metadata={"format": f"{FORMAT} {FORMAT_VERSION}"})


def shard_entry(path: Path, split: Split, *, rows: int) -> ShardEntry:
    """Describe a finished shard for the manifest.

    Args:
        path: The file.
        split: What text it is of.
        rows: Positions that it must hold.

    Raises:
        RecordingError: It is missing or broken, or holds another number of positions.
    """
    try:
        with safe_open(path, framework="pt") as shard:
            found = shard.get_slice("token_ids").get_shape()[0]
            states = _STATES[shard.get_slice("reference_hidden").get_dtype()]
    except (OSError, SafetensorError, KeyError) as error:
        raise _unreadable(path, error, hint=_BROKEN) from error
    if found != rows:
        raise RecordingError(f"{path} holds {found} positions, expected {rows}", hint=_BROKEN)
    size = path.stat().st_size
    return ShardEntry(
        file=path.name, split=split, rows=rows, states=states, sha256=sha256_file(path), bytes=size
    )


def file_entry(path: Path) -> FileEntry:
    """Describe any other file for the manifest."""
    return FileEntry(sha256=sha256_file(path), bytes=path.stat().st_size)


def write_unembedding(path: Path, unembedding: Unembedding) -> MovedHead:
    """Store an expert's own head as float16.

    Raises:
        StorageError: The disk is full or the path cannot be written.
    """
    tensors = {"weight": unembedding.weight.detach().half()}
    if unembedding.bias is not None:
        tensors["bias"] = unembedding.bias.detach().half()
    write_shard(path, tensors)
    return MovedHead(scale=unembedding.scale, softcap=unembedding.softcap)


def write_code(path: Path, code: StateCode) -> None:
    """Store what a compact recording's shards are read with; a byte for a number of a matrix.

    Raises:
        StorageError: The disk is full or the path cannot be written.
    """
    guess = code.foretelling
    columns = {"mean": guess.mean, "offset": guess.offset}
    for name, matrix in {"basis": code.basis, "up": guess.up, "down": guess.down.T}.items():
        largest = matrix.abs().amax(0).clamp(min=torch.finfo(matrix.dtype).tiny)
        columns[name] = (matrix / largest * 127).round().to(torch.int8)
        columns[f"{name}_largest"] = largest
    precision = {
        name: torch.tensor(value, dtype=torch.float64)
        for name, value in asdict(code.precision).items()
    }
    write_shard(path, columns | precision)


def read_code(path: Path, head: Unembedding) -> StateCode:
    """The code that `write_code` stored, with the coordinates as they were rounded.

    Args:
        path: The file.
        head: The reference's.

    Raises:
        RecordingError: The file is missing or broken.
    """
    try:
        with safe_open(path, framework="pt") as stored:
            tensors = {name: stored.get_tensor(name) for name in stored.keys()}
        basis, up, down = (
            tensors[name].float() * (tensors[f"{name}_largest"] / 127)
            for name in ("basis", "up", "down")
        )
        guess = Foretelling(down.T, up, tensors["mean"], tensors["offset"])
        step, likely, power, nats = (float(tensors[field.name]) for field in fields(Precision))
    except (OSError, SafetensorError, KeyError, RuntimeError) as error:
        raise _unreadable(path, error) from error
    return StateCode(basis, guess, head, Precision(step, int(likely), power, nats))


@final
class Recording:
    """A finished recording, open for reading."""

    def __init__(self, folder: Path, manifest: RecordingManifest) -> None:
        """Use `Recording.open`, which checks the files."""
        self._folder = folder
        self._manifest = manifest

    @classmethod
    def open(cls, folder: Path, *, verify: bool = True) -> "Recording":
        """Open a recording.

        Args:
            folder: Folder that `trimtab record` wrote.
            verify: Compare every file with its sha256, which reads all of it once; otherwise
                only sizes are compared.

        Raises:
            RecordingError: Absent, unfinished, of another format version, with an unknown key,
                or with a missing or changed file.
        """
        manifest = read_recording_manifest(folder)
        files = {shard.file: (shard.sha256, shard.bytes) for shard in manifest.shards}
        files |= {name: (entry.sha256, entry.bytes) for name, entry in manifest.files.items()}
        for name, (sha256, size) in files.items():
            _check_file(folder / name, sha256 if verify else None, size)
        return cls(folder, manifest)

    @property
    def manifest(self) -> RecordingManifest:
        """What the recording says of itself."""
        return self._manifest

    @property
    def folder(self) -> Path:
        """Where it lies."""
        return self._folder

    def documents(self, split: Split) -> tuple[RecordedDocument, ...]:
        """Names and lengths of a split's documents; `document_index` counts these.

        Raises:
            RecordingError: The list is missing or was changed.
        """
        path = self._folder / DOCUMENTS_NAME
        listed = read_json(path, "list of documents", error=RecordingError)
        try:
            return tuple(RecordedDocument.model_validate(entry) for entry in listed[split])
        except (KeyError, TypeError, ValidationError) as error:
            raise RecordingError(
                f"{path} is no list of documents of {split}", hint=RECORD_AGAIN
            ) from error

    def expert_unembedding(self) -> Unembedding | None:
        """The expert's own head in float32, where a full fine-tune moved it, else None."""
        head = self._manifest.expert_head
        if head is None:
            return None
        with safe_open(self._folder / UNEMBEDDING_NAME, framework="pt") as tensors:
            # As float32, since few processors multiply float16.
            parts = {name: tensors.get_tensor(name).float() for name in tensors.keys()}
        return Unembedding(parts["weight"], parts.get("bias"), head.scale, head.softcap)

    def state_code(self, head: Unembedding) -> StateCode:
        """What makes states of a recording that is compact.

        Args:
            head: The reference's.

        Raises:
            RecordingError: It is encoded otherwise, or its coordinates cannot be read.
        """
        encoding = self._manifest.encoding
        if not isinstance(encoding, CompactEncoding):
            raise RecordingError(
                f"the recording {self._folder} has encoding {encoding.kind!r}, not 'compact'",
                hint="record again with --encoding compact",
            )
        path = self._folder / CODE_NAME
        code = read_code(path, head)
        stated = encoding.model_dump(exclude={"kind", "id_bits"})
        if asdict(code.precision) != stated or len(code.basis) != self._manifest.hidden:
            raise RecordingError(
                f"{path} is not the code that {self._folder} was written with", hint=RECORD_AGAIN
            )
        return code

    def read(self, split: Split, columns: Sequence[str] | None = None) -> dict[str, Tensor]:
        """Read a whole split into memory.

        Args:
            split: train, held_out or general.
            columns: Which columns (see `column_names`); None reads all that it has.

        Returns:
            Each column over all positions of the split, in order of documents.

        Raises:
            RecordingError: A column that the split does not have, or a broken shard.
        """
        names = self._known(split, columns)
        parts = list(self.iter_shards(split, names))
        if not parts:
            return {name: self._empty(name) for name in names}
        return {name: torch.cat([part[name] for part in parts]) for name in names}

    def iter_shards(
        self, split: Split, columns: Sequence[str] | None = None
    ) -> Iterator[dict[str, Tensor]]:
        """Read a split shard by shard, in flat memory; arguments and errors as `read`."""
        names = self._known(split, columns)
        for shard in self._manifest.shards:
            if shard.split == split:
                yield self._read_shard(self._folder / shard.file, names)

    def _known(self, split: Split, columns: Sequence[str] | None) -> tuple[str, ...]:
        kind = self._manifest.encoding.kind
        known = column_names(kind) if self._manifest.has_expert(split) else COMMON_COLUMNS
        unknown = [name for name in columns or () if name not in known]
        if unknown:
            other = f"have the text among what is trained on (--data) to record its {unknown[0]}"
            is_elsewhere = set(unknown) <= set(column_names(kind))
            raise RecordingError(
                f"the recording {self._folder} has encoding {kind!r} and for {split} no column "
                f"{', '.join(unknown)}; it has {', '.join(known)}",
                hint=other
                if is_elsewhere
                else "record again with the encoding that is needed (--encoding)",
            )
        return known if columns is None else tuple(columns)

    def _read_shard(self, path: Path, names: tuple[str, ...]) -> dict[str, Tensor]:
        encoding = self._manifest.encoding
        try:
            with safe_open(path, framework="pt") as shard:
                columns = {n: shard.get_tensor(n) for n in names if n in _AS_STORED}
                unpacked = [name for name in names if name not in columns]
                if unpacked and isinstance(encoding, SparseEncoding):
                    columns |= _sparse(shard, unpacked, self._manifest.vocab)
                elif unpacked and isinstance(encoding, SampledEncoding):
                    columns |= _sampled(shard, encoding.draws, self._manifest.vocab)
                elif unpacked and isinstance(encoding, CompactEncoding):
                    columns |= _compact(shard, self._manifest.hidden, encoding.id_bits)
                return {name: columns[name] for name in names}
        except (OSError, SafetensorError, ValueError) as error:
            raise _unreadable(path, error) from error

    def _empty(self, name: str) -> Tensor:
        if name.endswith("_hidden"):
            return torch.empty(0, self._manifest.hidden, dtype=torch.float16)
        return torch.empty(0, dtype=torch.int32)


def _sparse(shard: Any, names: Sequence[str], vocab: int) -> dict[str, Tensor]:
    columns = {}
    for who in {name.split("_")[0] for name in names}:
        stored = {name: shard.get_tensor(f"{who}_{name}") for name in _TOPK}
        topk = unpack_topk(stored, vocab)
        columns |= {
            f"{who}_top_ids": topk.token_ids,
            f"{who}_top_logprobs": topk.logprobs,
            f"{who}_log_tail": topk.log_tail,
            f"{who}_log_normaliser": topk.log_normaliser,
        }
    return columns


def _sampled(shard: Any, draws: int, vocab: int) -> dict[str, Tensor]:
    stored = {name: shard.get_tensor(f"expert_{name}") for name in _STORED_SAMPLES}
    samples = unpack_samples(stored, draws, vocab)
    return {
        "expert_sample_ids": samples.token_ids,
        "expert_sample_counts": samples.counts,
    }


def _compact(shard: Any, hidden: int, id_bits: int) -> dict[str, Tensor]:
    stored = {name: shard.get_tensor(f"expert_{name}") for name in STATE_COLUMNS}
    states = unpack_states(stored, hidden, id_bits)
    return {
        "expert_numbers": states.numbers,
        "expert_halvings": states.halvings,
        "expert_unexpected_ids": states.unexpected.token_ids,
        "expert_unexpected_levels": states.unexpected.levels,
    }


def _check_file(path: Path, sha256: str | None, size: int) -> None:
    if not path.is_file():
        raise RecordingError(f"{path} is missing from the recording", hint=RECORD_AGAIN)
    found = path.stat().st_size
    if found != size:
        raise RecordingError(f"{path} has {found} bytes, expected {size}", hint=RECORD_AGAIN)
    digest = sha256_file(path) if sha256 else None
    if digest != sha256:
        raise RecordingError(
            f"{path} was changed: its sha256 is {digest}, expected {sha256}", hint=RECORD_AGAIN
        )


def _unreadable(path: Path, error: Exception, hint: str = RECORD_AGAIN) -> RecordingError:
    return RecordingError(f"cannot read the shard {path}: {error}", hint=hint)
