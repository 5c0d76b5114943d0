"""Seat an adapter on a host: closed form, in seconds, without training."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from trimtab.anchors import (
    Anchors,
    Reading,
    StateMap,
    calibrate,
    compose,
    fit_map,
    moment_matched,
    pair_anchors,
)
from trimtab.backends.hf import HFModel
from trimtab.backends.open import open_model
from trimtab.carriers.head import MountedHead, seat_rows
from trimtab.carriers.memory import CONTEXT_BYTES, VALUE_BYTES, Memory, MountedMemory, build_index
from trimtab.config import MountConfig
from trimtab.errors import AdapterError
from trimtab.store.adapter import Probe, read_head, read_memory, read_mount
from trimtab.store.adapter_schema import AdapterManifest
from trimtab.store.manifest import read_manifest
from trimtab.types import Progress, silent

POOR_FIT = 0.5
"""Anchor R^2 below which a user is warned."""

FEW_ANCHORS = 2000
"""Shared token strings below which a user is warned."""

MIN_PAIRS = 512
"""Probe positions at the same bytes that calibration needs."""


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
    manifest = read_manifest(config.adapter)
    host = host or open_model(config.host, dtype=config.dtype)
    anchors, probe = read_mount(config.adapter)
    state_map = _map(anchors, host, config)
    states = _probe_states(host, probe, progress) if config.moments else None
    seat = _Seat.prepare(state_map, probe, states)
    if config.shuffle:
        seat = seat.shuffled(config.seed)
    head = memory = None
    if manifest.head:
        file = read_head(config.adapter)
        reading = seat.read(file.head.down, file.head.mean, file.probe_features)
        head = MountedHead(reading, *seat_rows(file.strings, file.string_rows, host.vocabulary))
    if manifest.memory:
        file = read_memory(config.adapter, manifest)
        reading = seat.read(file.memory.projection, file.memory.mean, file.probe_features)
        values, shares = _values(file.memory, host)
        memory = MountedMemory(file.memory, build_index(file.memory), reading, values, shares)
    return Mounted(
        manifest,
        config.adapter,
        host.ref,
        state_map,
        seat.paired_positions,
        head,
        memory,
        probe.documents,
    )


def _map(anchors: Anchors, host: HFModel, config: MountConfig) -> StateMap:
    chosen, token_ids = pair_anchors(anchors.strings, host.vocabulary)
    if len(chosen) < 2:
        raise AdapterError(
            f"{host.ref} shares {len(chosen)} token strings with the adapter's small model",
            hint="head and memory need a common alphabet; use --carriers expert",
        )
    if config.shuffle:
        generator = torch.Generator().manual_seed(config.seed)
        token_ids = token_ids[torch.randperm(len(token_ids), generator=generator)]
    host_rows = host.unembedding.weight[token_ids].detach().float().cpu() * host.unembedding.scale
    return fit_map(anchors.rows[chosen], host_rows, anchors.weights[chosen], ridge=config.ridge)


@dataclass(frozen=True)
class _ProbeStates:
    """The host's states on the probe text, with the document and bytes read of each."""

    hidden: Tensor
    document_index: Tensor
    byte_ends: Tensor


def _probe_states(host: HFModel, probe: Probe, progress: Progress) -> _ProbeStates:
    hidden, documents, ends = [], [], []
    lengths = torch.tensor([len(text or b"") for text in host.vocabulary.token_bytes])
    context = host.context_ids()
    with progress("reading the probe text", len(probe.documents)) as advance:
        for number, document in enumerate(probe.documents):
            ids = host.encode(document.decode("utf-8", "ignore"))
            with torch.inference_mode():
                states = host.hidden(torch.tensor([context + ids], device=host.device))
            hidden.append(states[0, len(context) :].float().cpu())
            documents.append(torch.full((len(ids),), number))
            ends.append(lengths[ids].cumsum(0))
            advance(1)
    return _ProbeStates(torch.cat(hidden), torch.cat(documents), torch.cat(ends))


@dataclass(frozen=True)
class _Seat:
    """Reads any features of the small model's state from the host's."""

    reading: Reading
    states: _ProbeStates | None
    rows: Tensor
    host_rows: Tensor
    fold: Tensor

    @staticmethod
    def prepare(state_map: StateMap, probe: Probe, states: _ProbeStates | None) -> "_Seat":
        nothing = torch.zeros(0, dtype=torch.long)
        if states is None:
            plain = Reading(state_map.matrix, torch.zeros(len(state_map.matrix)))
            return _Seat(plain, None, nothing, nothing, nothing)
        reading = moment_matched(state_map, probe.mean, probe.std, states.hidden)
        rows, host_rows = _same_bytes(probe, states)
        return _Seat(reading, states, rows, host_rows, probe.document_index[rows] % 2)

    def shuffled(self, seed: int) -> "_Seat":
        """The control: each host state is paired with the small state of another position."""
        generator = torch.Generator().manual_seed(seed)
        return replace(self, rows=self.rows[torch.randperm(len(self.rows), generator=generator)])

    @property
    def paired_positions(self) -> int:
        return len(self.rows) if len(self.rows) >= MIN_PAIRS else 0

    def read(self, features: Tensor, offset: Tensor, probe_features: Tensor) -> Reading:
        reading = compose(features, offset, self.reading)
        if self.states is None or not self.paired_positions:
            return reading
        states = self.states.hidden[self.host_rows]
        return calibrate(reading, states, probe_features[self.rows], self.fold)


def _same_bytes(probe: Probe, states: _ProbeStates) -> tuple[Tensor, Tensor]:
    """Positions of small model and host that have read the same bytes of the same document."""
    place = {
        key: row
        for row, key in enumerate(
            zip(probe.document_index.tolist(), probe.byte_ends.tolist(), strict=True)
        )
    }
    host_keys = zip(states.document_index.tolist(), states.byte_ends.tolist(), strict=True)
    pairs = [(place[key], row) for row, key in enumerate(host_keys) if key in place]
    both = torch.tensor(pairs, dtype=torch.long).reshape(-1, 2)
    return both[:, 0], both[:, 1]


def _values(memory: Memory, host: HFModel) -> tuple[Tensor, Tensor]:
    """First host token of what followed each entry; for a soft memory, of what the expert saw."""
    raw = memory.text.numpy().tobytes()
    followed = [raw[p : p + VALUE_BYTES].split(b"\0")[0] for p in memory.positions.tolist()]
    hard = _first_tokens(followed, host)[:, None]
    return hard, torch.ones(len(hard), 1)


def _first_tokens(texts: Sequence[bytes], host: HFModel) -> Tensor:
    first: dict[bytes, int] = {}
    for text in texts:
        if text not in first:
            ids = host.encode(text.decode("utf-8", "ignore")) if text else []
            first[text] = ids[0] if ids else -1
    return torch.tensor([first[text] for text in texts])
