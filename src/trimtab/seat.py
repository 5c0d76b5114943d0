"""What seats an adapter's carriers on one host: readings of its states, and its tokens."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

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
from trimtab.carriers.memory import VALUE_BYTES, Memory
from trimtab.config import MountConfig
from trimtab.errors import AdapterError
from trimtab.store.adapter import HeadFile, MemoryFile, Probe
from trimtab.store.seats import Seats
from trimtab.types import Progress

MIN_PAIRS = 512
"""Probe positions at the same bytes that calibration needs."""


def find_seats(
    config: MountConfig,
    host: HFModel,
    anchors: Anchors,
    probe: Probe,
    states_on: Callable[[Probe], "ProbeStates"],
    head: HeadFile | None,
    memory: MemoryFile | None,
) -> Seats:
    """Compute where an adapter's carriers sit on a host.

    Args:
        config: How to mount.
        host: The host.
        anchors: The adapter's.
        probe: The adapter's.
        states_on: The host's states on the probe text; asked only if moments are matched.
        head: The adapter's, if it has one.
        memory: The adapter's, if it has one.

    Raises:
        AdapterError: The adapter shares no token string with the host.
    """
    state_map = _map(anchors, host, config)
    seat = _Seat.prepare(state_map, probe, states_on(probe) if config.moments else None)
    if config.shuffle:
        seat = seat.shuffled(config.seed)
    head_reading = memory_reading = values = None
    if head:
        head_reading = seat.read(head.head.down, head.head.mean, head.probe_features)
    if memory:
        entries = memory.memory
        memory_reading = seat.read(entries.projection, entries.mean, memory.probe_features)
        values = _values(entries, host)
    return Seats(state_map, seat.paired_positions, head_reading, memory_reading, values)


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
class ProbeStates:
    """A host's states on the probe text.

    Attributes:
        hidden: Shape [states, hidden of host].
        document_index: Document of each, shape [states].
        byte_ends: Bytes of its document read, shape [states].
    """

    hidden: Tensor
    document_index: Tensor
    byte_ends: Tensor


def probe_states(host: HFModel, probe: Probe, progress: Progress) -> ProbeStates:
    """Run a host over the probe text."""
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
    return ProbeStates(torch.cat(hidden), torch.cat(documents), torch.cat(ends))


@dataclass(frozen=True)
class _Seat:
    """Reads any features of the small model's state from the host's."""

    reading: Reading
    states: ProbeStates | None
    rows: Tensor
    host_rows: Tensor
    fold: Tensor

    @staticmethod
    def prepare(state_map: StateMap, probe: Probe, states: ProbeStates | None) -> "_Seat":
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


def _same_bytes(probe: Probe, states: ProbeStates) -> tuple[Tensor, Tensor]:
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


def _values(memory: Memory, host: HFModel) -> Tensor:
    """First host token of what followed each entry, -1 for none, shape [entries, 1]."""
    raw = memory.text.numpy().tobytes()
    followed = [raw[p : p + VALUE_BYTES].split(b"\0")[0] for p in memory.positions.tolist()]
    return _first_tokens(followed, host)[:, None]


def _first_tokens(texts: Sequence[bytes], host: HFModel) -> Tensor:
    first: dict[bytes, int] = {}
    for text in texts:
        if text not in first:
            ids = host.encode(text.decode("utf-8", "ignore")) if text else []
            first[text] = ids[0] if ids else -1
    return torch.tensor([first[text] for text in texts])
