"""The tensors of an adapter on disk; docs/format.md names each."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from trimtab.anchors import Anchors
from trimtab.carriers.gate import GATE_FEATURES
from trimtab.carriers.head import Head
from trimtab.carriers.memory import Memory, joined_text
from trimtab.carriers.sources import Sources
from trimtab.errors import AdapterError
from trimtab.store.adapter_schema import AdapterManifest
from trimtab.store.files import writing_atomically
from trimtab.store.streamed import rows_of, save_streamed

MOUNT_FILE = "mount.safetensors"
HEAD_FILE = "head.safetensors"
MEMORY_FILE = "memory/memory.safetensors"
EXPERT_FOLDER = "expert"


@dataclass(frozen=True)
class Probe:
    """General text and where the small model's states on it were taken.

    Attributes:
        documents: The texts, as bytes.
        document_index: Document of each state, shape [states].
        byte_ends: Bytes of its document that the small model had read, shape [states].
        mean: Mean state, shape [hidden].
        std: Standard deviation of the states, shape [hidden].
    """

    documents: tuple[bytes, ...]
    document_index: Tensor
    byte_ends: Tensor
    mean: Tensor
    std: Tensor


@dataclass(frozen=True)
class HeadFile:
    """A head with what a host needs to wear it.

    Attributes:
        head: The layer.
        strings: Every token string of the small model.
        string_rows: W_A [up | offset] of each string, shape [strings, rank + 1].
        probe_features: down @ (h - mean) on the probe text, shape [states, rank].
    """

    head: Head
    strings: tuple[bytes, ...]
    string_rows: Tensor
    probe_features: Tensor


@dataclass(frozen=True)
class MemoryFile:
    """A memory with its features on the probe text, shape [states, key]."""

    memory: Memory
    probe_features: Tensor


def pack_strings(strings: Sequence[bytes]) -> tuple[Tensor, Tensor]:
    """Join byte strings into one tensor; also give where each ends."""
    blob = torch.frombuffer(bytearray(b"".join(strings) or b"\0"), dtype=torch.uint8)
    ends = torch.tensor([len(s) for s in strings], dtype=torch.int64).cumsum(0)
    return blob, ends


def unpack_strings(blob: Tensor, ends: Tensor) -> tuple[bytes, ...]:
    """The byte strings that `pack_strings` joined."""
    raw, stops = blob.numpy().tobytes(), ends.tolist()
    return tuple(raw[start:stop] for start, stop in zip([0, *stops], stops, strict=False))


def _quantise_rows(rows: Tensor) -> tuple[Tensor, Tensor]:
    scale = rows.abs().amax(1).clamp_min(1e-12) / 127
    return (rows / scale[:, None]).round().to(torch.int8), scale


def write_mount(folder: Path, anchors: Anchors, probe: Probe) -> None:
    """Write mount.safetensors: anchors in int8 with a scale a row, and the probe."""
    rows, scales = _quantise_rows(anchors.rows)
    anchor_bytes, anchor_ends = pack_strings(anchors.strings)
    probe_bytes, probe_ends = pack_strings(probe.documents)
    _save(
        folder / MOUNT_FILE,
        {
            "anchor_bytes": anchor_bytes,
            "anchor_ends": anchor_ends,
            "anchor_rows": rows,
            "anchor_scales": scales,
            "anchor_weights": anchors.weights,
            "probe_bytes": probe_bytes,
            "probe_ends": probe_ends,
            "probe_document": probe.document_index,
            "probe_byte_ends": probe.byte_ends,
            "state_mean": probe.mean,
            "state_std": probe.std,
        },
    )


def read_mount(folder: Path) -> tuple[Anchors, Probe]:
    """Read mount.safetensors.

    Raises:
        AdapterError: The file is missing or lacks a tensor.
    """
    found = _load(folder / MOUNT_FILE)
    anchors = Anchors(
        unpack_strings(found["anchor_bytes"], found["anchor_ends"]),
        found["anchor_rows"].float() * found["anchor_scales"][:, None],
        found["anchor_weights"],
    )
    probe = Probe(
        unpack_strings(found["probe_bytes"], found["probe_ends"]),
        found["probe_document"],
        found["probe_byte_ends"],
        found["state_mean"],
        found["state_std"],
    )
    return anchors, probe


def write_head(folder: Path, file: HeadFile) -> None:
    """Write head.safetensors."""
    string_bytes, string_ends = pack_strings(file.strings)
    tensors = {
        **file.head.tensors(),
        "string_bytes": string_bytes,
        "string_ends": string_ends,
        "string_rows": file.string_rows.half(),
        "probe_features": file.probe_features.half(),
    }
    _save(folder / HEAD_FILE, tensors)


def read_head(folder: Path) -> HeadFile:
    """Read head.safetensors.

    Raises:
        AdapterError: The file is missing or lacks a tensor.
    """
    found = _load(folder / HEAD_FILE)
    head = Head(found["down"], found["up"], found["offset"], found["mean"])
    strings = unpack_strings(found["string_bytes"], found["string_ends"])
    return HeadFile(head, strings, found["string_rows"].float(), found["probe_features"].float())


def write_memory(folder: Path, file: MemoryFile, more: Sequence[Memory] = ()) -> None:
    """Write memory/memory.safetensors; its gates are in the manifest.

    Args:
        folder: Of the adapter.
        file: The memory.
        more: Others that are written behind it (`joined_text`), without joining their keys in RAM;
            the memory then answers with what followed.
    """
    memory, keys = file.memory, [file.memory.keys, *(other.keys for other in more)]
    if more:
        text, positions, sources = joined_text(memory, more)
        memory = replace(memory, text=text, positions=positions, sources=sources)
    tensors = {name: rows_of([tensor]) for name, tensor in _memory_tensors(memory).items()}
    tensors |= {
        "keys": rows_of(keys),
        "probe_features": rows_of([file.probe_features.half()]),
    }
    path = folder / MEMORY_FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    with writing_atomically(path) as temp:
        save_streamed(temp, tensors)


def _memory_tensors(memory: Memory) -> dict[str, Tensor]:
    """What a file holds of a memory, but for its keys."""
    tensors = {
        "projection": memory.projection,
        "mean": memory.mean,
        "text": memory.text,
        "positions": memory.positions,
    }
    if memory.soft_ids is not None and memory.soft_probs is not None:
        string_bytes, string_ends = pack_strings(memory.soft_strings)
        tensors |= {
            "soft_ids": memory.soft_ids,
            "soft_probs": memory.soft_probs.half(),
            "soft_string_bytes": string_bytes,
            "soft_string_ends": string_ends,
        }
    if memory.sources:
        source_bytes, source_ends = pack_strings([name.encode() for name in memory.sources.names])
        tensors |= {
            "source_bytes": source_bytes,
            "source_ends": source_ends,
            "source_starts": torch.tensor(memory.sources.starts, dtype=torch.int64),
        }
    return tensors


def read_memory(folder: Path, manifest: AdapterManifest) -> MemoryFile:
    """Read memory/memory.safetensors, with the gates from the manifest.

    Raises:
        AdapterError: The file is missing or lacks a tensor, holds another number of entries than
            the manifest says, or the gate reads other features.
    """
    found = _load(folder / MEMORY_FILE)
    carrier = manifest.memory
    if carrier and len(found["keys"]) != carrier.entries:
        raise AdapterError(
            f"{folder / MEMORY_FILE} holds {len(found['keys'])} entries, the manifest says"
            f" {carrier.entries}: another run may have changed the adapter just now",
            hint="run the same command again; if it says so again, fetch the adapter again",
        )
    for gate in (carrier.gate, carrier.own_gate, carrier.bytes_gate) if carrier else ():
        if gate.features and gate.features != GATE_FEATURES:
            raise AdapterError(
                f"the memory's gate reads {', '.join(gate.features)}; this version of trimtab has"
                f" {', '.join(GATE_FEATURES)}",
                hint="make the adapter anew with `trimtab fit`, or use --carriers head,expert",
            )
    soft = carrier is not None and carrier.values == "soft"
    memory = Memory(
        found["keys"],
        found["projection"],
        found["mean"],
        found["text"],
        found["positions"],
        carrier.gate.weights if carrier else (),
        carrier.own_gate.weights if carrier else (),
        carrier.bytes_gate.weights if carrier else (),
        found["soft_ids"] if soft else None,
        found["soft_probs"] if soft else None,
        unpack_strings(found["soft_string_bytes"], found["soft_string_ends"]) if soft else (),
        _read_sources(found) if "source_starts" in found else None,
    )
    return MemoryFile(memory, found["probe_features"].float())


def _read_sources(found: Mapping[str, Tensor]) -> Sources:
    names = unpack_strings(found["source_bytes"], found["source_ends"])
    starts = tuple(found["source_starts"].tolist())
    if len(names) != len(starts) or list(starts) != sorted(starts) or not starts:
        raise AdapterError(
            f"the memory names {len(names)} documents and says of {len(starts)} where they begin",
            hint="fetch the adapter again, or run `trimtab fit` again",
        )
    return Sources(tuple(name.decode("utf-8", "replace") for name in names), starts)


def _save(path: Path, tensors: Mapping[str, Tensor]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with writing_atomically(path) as temp:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temp)


class _Tensors(dict[str, Tensor]):
    """Tensors of a file; asking for one that is not there is an AdapterError."""

    def __missing__(self, name: str) -> Tensor:
        raise AdapterError(
            f"the adapter lacks the tensor {name!r}",
            hint="fetch the adapter again, or run `trimtab fit` again",
        )


def _load(path: Path) -> _Tensors:
    if not path.is_file():
        raise AdapterError(
            f"{path} is missing", hint="fetch the adapter again, or run `trimtab fit` again"
        )
    try:
        return _Tensors(load_file(path))
    except SafetensorError as error:
        raise AdapterError(
            f"{path} is broken: {error}",
            hint="fetch the adapter again, or run `trimtab fit` again",
        ) from error
