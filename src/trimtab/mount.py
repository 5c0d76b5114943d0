"""Seat an adapter on a host: closed form, in seconds, without training."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch

from trimtab.align.strings import token_lengths
from trimtab.anchors import Reading
from trimtab.backends.hf import HFModel
from trimtab.backends.open import open_host
from trimtab.carriers.head import Head, MountedHead, seat_rows
from trimtab.carriers.memory import Memory, sources_of
from trimtab.carriers.recall import MountedMemory
from trimtab.carriers.search import Index
from trimtab.config import CarrierName, MountConfig
from trimtab.errors import AdapterError
from trimtab.steering.host_keys import host_keys
from trimtab.steering.host_states import HostStates, host_states, kept_host_states
from trimtab.steering.mounted import Mounted
from trimtab.steering.seat import Seatable, find_seats, grown_seats
from trimtab.store.adapter import MEMORY_FILE, Probe, read_head, read_memory, read_mount
from trimtab.store.adapter_schema import AdapterManifest, HeadCarrier
from trimtab.store.index import index_path, kept_index
from trimtab.store.manifest import read_manifest
from trimtab.store.seats import HostKeys, Seats, read_seats, seats_path, write_seats
from trimtab.types import Progress, silent

Asked = TypeVar("Asked")
Found = TypeVar("Found")


def mount(
    config: MountConfig, *, host: HFModel | None = None, progress: Progress = silent
) -> Mounted:
    """Seat an adapter on a host.

    Args:
        config: Which adapter, which host, and how.
        host: The host, if it is open already.
        progress: Shows the pass over the probe text.

    Raises:
        AdapterError: The adapter is broken, lacks a carrier that was asked for, shares no token
            string with the host, has a head that was fitted on another host, or a memory too
            short for keys of the host's own.
        ModelError: The host cannot be opened.
    """
    if host is None:
        # What is wrong with an adapter is said before a host is opened for it, which takes long.
        read_manifest(config.adapter)
        host = open_host(config, progress)
    return _mount(
        config,
        host,
        partial(_probe_states, config, host, progress=progress),
        partial(host_keys, host=host, progress=progress),
        progress,
    )


def is_kept(config: MountConfig, host: HFModel) -> bool:
    """Whether an adapter's seat on a host is kept on disk, so that mounting it runs no model.

    Args:
        config: Which adapter, which host, and how.
        host: The host; its body is not needed.

    Raises:
        AdapterError: As `mount`, of what the manifest says.
    """
    manifest = read_manifest(config.adapter)
    config, path = _place(config, manifest, host)
    if not _keeps(config, host):
        return False
    return read_seats(path) is not None or _seats_before(config, manifest, host) is not None


def mount_with_control(
    config: MountConfig, host: HFModel, *, progress: Progress = silent
) -> tuple[Mounted, Mounted]:
    """Seat an adapter twice, as it should be and with a shuffled map: one pass over the probe.

    A head that was fitted on the host has no map to shuffle; the control is then without one.

    Raises:
        AdapterError: As `mount`.
    """
    states = _once(partial(_probe_states, config, host, progress=progress))
    keys = _once(partial(host_keys, host=host, progress=progress))
    shuffled = config.model_copy(update={"shuffle": True})
    first, second = (_mount(each, host, states, keys, progress) for each in (config, shuffled))
    return first, second


def _once(compute: Callable[[Asked], Found]) -> Callable[[Asked], Found]:
    """The same for a caller that always asks about the same: it is computed once."""
    found: list[Found] = []

    def once(asked: Asked) -> Found:
        if not found:
            found.append(compute(asked))
        return found[0]

    return once


def _probe_states(
    config: MountConfig, host: HFModel, probe: Probe, progress: Progress
) -> HostStates:
    label = "reading the probe text"
    if _keeps(config, host):
        return kept_host_states(host, probe.documents, label, progress)
    return host_states(host, probe.documents, label, progress)


def _keeps(config: MountConfig, host: HFModel) -> bool:
    # A preamble moves the host's states, and has no say in a kept file's name.
    return config.cache and host.source is not None and not host.preamble


def _mount(
    config: MountConfig,
    host: HFModel,
    states_on: Callable[[Probe], HostStates],
    keys_on: Callable[[Memory], HostKeys],
    progress: Progress,
) -> Mounted:
    manifest = read_manifest(config.adapter)
    config, path = _place(config, manifest, host)
    parts, own_head = _read(config, manifest, host)
    cache = _keeps(config, host)
    seats = read_seats(path) if cache else None
    if seats is None:
        seats = _grown(config, manifest, host, parts) if cache else None
        seats = seats or find_seats(config, host, parts, states_on, keys_on)
        if cache:
            write_seats(path, seats)
    head = None if own_head is None or config.shuffle else _seat_own(own_head, host)
    if parts.head and seats.head:
        rows = seat_rows(parts.head.strings, parts.head.string_rows, host.vocabulary)
        head = MountedHead(seats.head, *rows)
    kept = _index_path(config, manifest, seats, path if cache else None)
    # Lists of the small model's keys say nothing of keys that a host has made itself.
    grows = manifest.memory is not None and not seats.host_keys
    earlier = manifest.memory.grown_from if manifest.memory and grows else ()
    index_of = partial(
        kept_index,
        path=kept,
        progress=progress,
        earlier=[(index_path(one.sha256), one.entries) for one in earlier],
    )
    return Mounted(
        manifest,
        config.adapter,
        host.ref,
        seats.state_map,
        seats.paired_positions,
        head,
        _seat_memory(parts, seats, index_of),
        parts.probe.documents,
    )


def _place(
    config: MountConfig, manifest: AdapterManifest, host: HFModel
) -> tuple[MountConfig, Path]:
    """Where seats are kept; the carriers are named the same however they were asked for."""
    config = config.model_copy(update={"carriers": _to_seat(config, manifest)})
    return config, seats_path(config, manifest, _identity(host))


def _identity(host: HFModel) -> tuple[object, ...]:
    return host.source, host.fingerprint, host.model.dtype


def _grown(
    config: MountConfig, manifest: AdapterManifest, host: HFModel, parts: Seatable
) -> Seats | None:
    """Seats from those of the adapter before its memory grew, if these are kept."""
    seats = _seats_before(config, manifest, host)
    if seats is None or parts.memory is None:
        return None
    return grown_seats(seats, parts.memory.memory, host)


def _seats_before(config: MountConfig, manifest: AdapterManifest, host: HFModel) -> Seats | None:
    """The latest seats that are kept of an adapter's smaller memories."""
    if manifest.memory is None or "memory" not in (config.carriers or ()) or config.host_keys:
        return None
    for earlier in manifest.memory.grown_from:
        seats = read_seats(seats_path(config, manifest, _identity(host), earlier.sha256))
        values = None if seats is None else seats.values
        if values is not None and len(values) == earlier.entries <= manifest.memory.entries:
            return seats
    return None


def _read(
    config: MountConfig, manifest: AdapterManifest, host: HFModel
) -> tuple[Seatable, Head | None]:
    """What is seated through the vocabulary, and a head that was fitted on this host."""
    wanted = config.carriers or ()
    head = read_head(config.adapter) if "head" in wanted else None
    memory = read_memory(config.adapter, manifest) if "memory" in wanted else None
    own = None
    if head and manifest.head and manifest.head.host is not None:
        _check_host(manifest.head, host)
        own, head = head.head, None
    return Seatable(*read_mount(config.adapter), head, memory), own


def _index_path(
    config: MountConfig, manifest: AdapterManifest, seats: Seats, kept: Path | None
) -> Path | None:
    """Where the search over a memory is kept: one for all hosts that ask the adapter's keys."""
    if seats.host_keys:
        return index_path(kept.stem) if kept else None
    file = manifest.files.get(MEMORY_FILE)
    return index_path(file.sha256) if config.cache and file else None


def _seat_memory(
    parts: Seatable, seats: Seats, index_of: Callable[[Memory], Index]
) -> MountedMemory | None:
    if parts.memory is None:
        return None
    memory = parts.memory.memory
    memory = replace(memory, sources=sources_of(memory))
    if seats.host_keys:
        return _seat_host_keys(memory, seats.host_keys, index_of)
    if seats.memory is None:
        return None
    assert seats.values is not None and seats.shares is not None
    return MountedMemory(memory, index_of(memory), seats.memory, seats.values, seats.shares)


def _seat_host_keys(
    memory: Memory, own: HostKeys, index_of: Callable[[Memory], Index]
) -> MountedMemory:
    """The same text under the host's keys; each entry is answered by the token that followed."""
    memory = replace(
        memory,
        keys=own.keys,
        projection=own.projection,
        mean=own.mean,
        positions=own.positions,
        soft_ids=None,
        soft_probs=None,
        soft_strings=(),
    )
    reading = Reading(own.projection, -own.projection @ own.mean)
    values = own.following[:, None]
    shares = torch.ones(values.shape)
    return MountedMemory(memory, index_of(memory), reading, values, shares, is_own=True)


def _to_seat(config: MountConfig, manifest: AdapterManifest) -> tuple[CarrierName, ...]:
    """The carriers that need a seat; the expert does not."""
    missing = [name for name in config.carriers or () if name not in manifest.carriers]
    if missing:
        raise AdapterError(
            f"the adapter {manifest.name} does not carry {', '.join(missing)};"
            f" it carries {', '.join(manifest.carriers)}",
            hint="name carriers that it has in --carriers",
        )
    wanted = manifest.carriers if config.carriers is None else config.carriers
    seats: tuple[CarrierName, ...] = ("head", "memory")
    return tuple(name for name in seats if name in wanted and name in manifest.carriers)


def _check_host(head: HeadCarrier, host: HFModel) -> None:
    ours = (head.host_vocabulary_sha256, head.host_unembedding_sha256)
    if (host.fingerprint.vocabulary_sha256, host.fingerprint.unembedding_sha256) != ours:
        raise AdapterError(
            f"the adapter's head was fitted on the host {head.host} and works on no other;"
            f" {host.ref} is another model (its fingerprint differs)",
            hint=f"mount it on {head.host}, or run `trimtab fit` without --host for a head that any"
            " host can wear; mount and generate also take --carriers memory",
        )


def _seat_own(head: Head, host: HFModel) -> MountedHead:
    """Seat a head that was fitted on this very host: exact, but silent on special tokens."""
    weight = host.unembedding.weight.detach().float().cpu()
    rows = weight @ torch.cat([head.up, head.offset[:, None]], 1) * host.unembedding.scale
    rows = rows * (token_lengths(host.vocabulary) > 0)[:, None]
    reading = Reading(head.down, -head.down @ head.mean)
    return MountedHead(reading, rows[:, :-1].contiguous(), rows[:, -1].contiguous())
