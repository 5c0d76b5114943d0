"""Seat an adapter on a host: closed form, in seconds, without training."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from trimtab.anchors import StateMap
from trimtab.backends.hf import HFModel
from trimtab.backends.open import open_model
from trimtab.carriers.head import MountedHead, seat_rows
from trimtab.carriers.memory import CONTEXT_BYTES, MountedMemory, build_index
from trimtab.config import MountConfig
from trimtab.seat import ProbeStates, find_seats, probe_states
from trimtab.store.adapter import Probe, read_head, read_memory, read_mount
from trimtab.store.adapter_schema import AdapterManifest
from trimtab.store.manifest import read_manifest
from trimtab.store.seats import read_seats, seats_path, write_seats
from trimtab.types import Progress, silent

POOR_FIT = 0.5
"""Anchor R^2 below which a user is warned."""

FEW_ANCHORS = 2000
"""Shared token strings below which a user is warned."""


@dataclass(frozen=True)
class Mounted:
    """An adapter seated on one host.

    Attributes:
        manifest: Of the adapter.
        folder: Of the adapter.
        host_ref: The host.
        state_map: How the vocabulary maps the host's states to the small model's.
        paired_positions: Probe positions that the map was calibrated on, 0 if it was not.
        head: The head, if the adapter has one.
        memory: The memory, if the adapter has one.
        probe_documents: The adapter's general text.
    """

    manifest: AdapterManifest
    folder: Path
    host_ref: str
    state_map: StateMap
    paired_positions: int
    head: MountedHead | None
    memory: MountedMemory | None
    probe_documents: tuple[bytes, ...]

    @property
    def domain_documents(self) -> list[bytes]:
        """The training text that the memory holds, if it holds any."""
        if self.memory is None:
            return []
        raw = self.memory.memory.text.numpy().tobytes()
        return [part for part in raw.split(bytes(CONTEXT_BYTES)) if part]

    @property
    def warnings(self) -> tuple[str, ...]:
        """What a user should know about a poor fit, in plain words."""
        found = []
        if self.state_map.r_squared < POOR_FIT:
            found.append(
                f"the vocabularies explain only {self.state_map.r_squared:.0%} of each other:"
                " head and memory will help little here; the expert carrier does not depend on it"
            )
        if self.state_map.shared_tokens < FEW_ANCHORS:
            found.append(
                f"only {self.state_map.shared_tokens} token strings are shared: the map is rough"
            )
        return tuple(found)

    def summary(self) -> str:
        """How well it fits."""
        lines = [
            f"{self.manifest.name} on {self.host_ref}: {self.state_map.shared_tokens} shared"
            f" token strings, anchor R^2 {self.state_map.r_squared:.3f},"
            f" calibrated on {self.paired_positions} positions",
            *(f"warning: {warning}" for warning in self.warnings),
        ]
        return "\n".join(lines)


def mount(
    config: MountConfig, *, host: HFModel | None = None, progress: Progress = silent
) -> Mounted:
    """Seat an adapter on a host.

    Args:
        config: Which adapter, which host, and how.
        host: The host, if it is open already.
        progress: Shows the pass over the probe text.

    Raises:
        AdapterError: The adapter is broken, or shares no token string with the host.
        ModelError: The host cannot be opened.
    """
    host = host or open_model(config.host, dtype=config.dtype, progress=progress)
    return _mount(config, host, lambda probe: probe_states(host, probe, progress))


def mount_with_control(
    config: MountConfig, host: HFModel, *, progress: Progress = silent
) -> tuple[Mounted, Mounted]:
    """Seat an adapter twice, as it should be and with a shuffled map: one pass over the probe.

    Raises:
        AdapterError: The adapter is broken, or shares no token string with the host.
    """
    read: list[ProbeStates] = []

    def states(probe: Probe) -> ProbeStates:
        if not read:
            read.append(probe_states(host, probe, progress))
        return read[0]

    shuffled = config.model_copy(update={"shuffle": True})
    return _mount(config, host, states), _mount(shuffled, host, states)


def _mount(
    config: MountConfig, host: HFModel, states_on: Callable[[Probe], ProbeStates]
) -> Mounted:
    manifest = read_manifest(config.adapter)
    head_file = read_head(config.adapter) if manifest.head else None
    memory_file = read_memory(config.adapter, manifest) if manifest.memory else None
    anchors, probe = read_mount(config.adapter)
    path = seats_path(config, manifest, host.fingerprint, host.model.dtype)
    seats = read_seats(path) if config.cache else None
    if seats is None:
        seats = find_seats(config, host, anchors, probe, states_on, head_file, memory_file)
        if config.cache:
            write_seats(path, seats)
    head = memory = None
    if head_file and seats.head:
        rows = seat_rows(head_file.strings, head_file.string_rows, host.vocabulary)
        head = MountedHead(seats.head, *rows)
    if memory_file and seats.memory and seats.values is not None:
        index = build_index(memory_file.memory)
        shares = torch.ones(seats.values.shape)
        memory = MountedMemory(memory_file.memory, index, seats.memory, seats.values, shares)
    return Mounted(
        manifest,
        config.adapter,
        host.ref,
        seats.state_map,
        seats.paired_positions,
        head,
        memory,
        probe.documents,
    )
