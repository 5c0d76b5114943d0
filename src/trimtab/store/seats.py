"""What a mount computed for one adapter on one host, kept so that it is computed once."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from trimtab.anchors import Reading, StateMap
from trimtab.config import MountConfig
from trimtab.store.adapter import HEAD_FILE, MEMORY_FILE, MOUNT_FILE
from trimtab.store.adapter_schema import AdapterManifest
from trimtab.store.files import writing_atomically
from trimtab.store.home import trimtab_home

VERSION = 7
"""Changes whenever the way in which seats are computed does."""

_SEATED = (MOUNT_FILE, HEAD_FILE, MEMORY_FILE)
"""Files of an adapter that decide where it sits."""


@dataclass(frozen=True)
class HostKeys:
    """Keys of a memory that a host made itself.

    Attributes:
        keys: Unit vectors in float16, shape [entries, key].
        projection: Whitening of the host's states, shape [key, hidden of host].
        mean: Shape [hidden of host].
        positions: Where in the memory's text what followed begins, shape [entries].
        following: The host token that begins it, shape [entries].
    """

    keys: Tensor
    projection: Tensor
    mean: Tensor
    positions: Tensor
    following: Tensor


@dataclass(frozen=True)
class Seats:
    """Where an adapter's carriers sit on a host.

    Attributes:
        state_map: From the host's states to the small model's.
        paired_positions: Probe positions that the readings were calibrated on.
        head: What the head reads, if there is one.
        memory: What the memory is asked with, if there is one.
        values: Host tokens that the memory's entries propose, shape [entries, proposals].
        shares: How likely each entry finds them, same shape.
        host_keys: In place of memory, values and shares: keys that the host made itself.
    """

    state_map: StateMap
    paired_positions: int
    head: Reading | None
    memory: Reading | None
    values: Tensor | None
    shares: Tensor | None
    host_keys: HostKeys | None = None


def seats_path(
    config: MountConfig,
    manifest: AdapterManifest,
    host: tuple[object, ...],
    memory_sha256: str | None = None,
) -> Path:
    """The cache file of an adapter on a host, named by all that decides its content.

    Args:
        config: How it is mounted.
        manifest: Of the adapter.
        host: What tells the host from others.
        memory_sha256: Of the adapter as it was while its memory's file was this one.
    """
    settings = config.model_dump(mode="json", exclude={"adapter", "host", "cache"})
    files = {p: entry.sha256 for p, entry in manifest.files.items() if p in _SEATED}
    if memory_sha256 is not None:
        files[MEMORY_FILE] = memory_sha256
    asked = [VERSION, settings, files, *map(str, host)]
    key = hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()
    return trimtab_home() / "mounts" / f"{key}.safetensors"


def write_seats(path: Path, seats: Seats) -> None:
    """Keep seats, atomically.

    Raises:
        StorageError: The disk is full or the folder cannot be written.
    """
    numbers = [seats.state_map.r_squared, seats.state_map.shared_tokens, seats.paired_positions]
    tensors = {
        "map": seats.state_map.matrix,
        "numbers": torch.tensor(numbers, dtype=torch.float64),
    }
    for name, reading in (("head", seats.head), ("memory", seats.memory)):
        if reading:
            tensors |= {f"{name}.matrix": reading.matrix, f"{name}.bias": reading.bias}
    if seats.values is not None and seats.shares is not None:
        tensors |= {"values": seats.values, "shares": seats.shares}
    if seats.host_keys:
        tensors |= {f"host_keys.{name}": part for name, part in vars(seats.host_keys).items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    with writing_atomically(path) as temp:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temp)


def read_seats(path: Path) -> Seats | None:
    """Seats kept before; None where there are none, or a broken file that is made anew."""
    try:
        found = load_file(path)
        return _seats(found)
    except (FileNotFoundError, SafetensorError, KeyError):
        return None


def _seats(found: dict[str, Tensor]) -> Seats:
    r_squared, shared, paired = found["numbers"].tolist()
    head, memory = (
        Reading(found[f"{name}.matrix"], found[f"{name}.bias"]) if f"{name}.bias" in found else None
        for name in ("head", "memory")
    )
    state_map = StateMap(found["map"], r_squared, int(shared))
    values, shares = found.get("values"), found.get("shares")
    own = {
        name.removeprefix("host_keys."): part
        for name, part in found.items()
        if name.startswith("host_keys.")
    }
    host_keys = HostKeys(**own) if own else None
    return Seats(state_map, int(paired), head, memory, values, shares, host_keys)
