"""What seats an adapter's carriers on one host: readings of its states, and its tokens."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from trimtab.anchors import (
    Anchors,
    Reading,
    StateMap,
    compose,
    fit_map,
    moment_matched,
    pair_anchors,
)
from trimtab.backends.hf import HFModel
from trimtab.backends.tokenizers import encode_all_following
from trimtab.calibration import PairedStates
from trimtab.carriers.memory import Memory
from trimtab.config import MountConfig
from trimtab.errors import AdapterError
from trimtab.steering.host_keys import shuffled
from trimtab.steering.host_states import HostStates, same_bytes
from trimtab.steering.proposals import first_tokens, propose
from trimtab.store.adapter import HeadFile, MemoryFile, Probe
from trimtab.store.seats import HostKeys, Seats

MIN_PAIRS = 512
"""Probe positions at the same bytes that calibration needs."""


@dataclass(frozen=True)
class Seatable:
    """What of an adapter is seated through the vocabulary.

    Attributes:
        anchors: Token strings with the small model's rows.
        probe: General text and the small model's states there.
        head: The head, unless there is none or it was fitted on the host itself.
        memory: The memory, if there is one.
    """

    anchors: Anchors
    probe: Probe
    head: HeadFile | None
    memory: MemoryFile | None


def find_seats(
    config: MountConfig,
    host: HFModel,
    parts: Seatable,
    states_on: Callable[[Probe], HostStates],
    keys_on: Callable[[Memory], HostKeys],
) -> Seats:
    """Compute where an adapter's carriers sit on a host.

    Args:
        config: How to mount.
        host: The host.
        parts: Of the adapter.
        states_on: The host's states on the probe text; asked only if moments are matched and
            something reads the host's states through the map.
        keys_on: The keys that the host makes of a memory itself; asked only if they are wanted.

    Raises:
        AdapterError: The adapter shares no token string with the host.
    """
    state_map = _map(parts.anchors, host, config)
    head, memory = parts.head, parts.memory
    own = keys_on(memory.memory) if memory and config.host_keys else None
    if own:
        memory = None
    asked = config.moments and (head is not None or memory is not None)
    seat = _Seat.prepare(state_map, parts.probe, states_on(parts.probe) if asked else None)
    if config.shuffle:
        seat = seat.shuffled(config.seed)
    head_reading = memory_reading = said = None
    if head:
        head_reading = seat.read(head.head.down, head.head.mean, head.probe_features)
    if memory:
        entries = memory.memory
        memory_reading = seat.read(entries.projection, entries.mean, memory.probe_features)
        said = propose(entries, following(entries, host), host.strings)
    return Seats(
        state_map,
        seat.paired_positions,
        head_reading,
        memory_reading,
        said.values if said else None,
        said.shares if said else None,
        shuffled(own, config.seed) if own and config.shuffle else own,
    )


def grown_seats(seats: Seats, memory: Memory, host: HFModel) -> Seats:
    """Seats of an adapter whose memory has grown: only what was appended is looked at.

    Args:
        seats: Of the adapter on this host before, whose entries are the memory's first.
        memory: The memory as it is now.
        host: The host.
    """
    assert seats.values is not None and seats.shares is not None
    more = replace(memory, positions=memory.positions[len(seats.values) :])
    said = propose(more, following(more, host), host.strings)
    values, shares = (
        torch.cat(both) for both in ((seats.values, said.values), (seats.shares, said.shares))
    )
    return replace(seats, values=values, shares=shares)


def following(memory: Memory, host: HFModel) -> Tensor:
    """Host token that begins what followed each entry, -1 for none, shape [entries]."""
    return first_tokens(memory, partial(_first_of_each, host))


def _first_of_each(host: HFModel, texts: Sequence[bytes]) -> list[int]:
    if host.vocabulary.prefix_space:
        # Such a tokenizer reads every text as the beginning of one and puts a space before it.
        return [host.strings.longest_token(text) for text in texts]
    whole = [text.decode("utf-8", "ignore") for text in texts]
    read = encode_all_following(host.tokenizer, whole, host.vocabulary)
    return [ids[0] if text and ids else -1 for text, ids in zip(texts, read, strict=True)]


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
class _Seat:
    """Reads any features of the small model's state from the host's.

    Attributes:
        reading: Of the small model's state itself.
        pairs: The host's states where both have read the same bytes; None where these are few.
        rows: The small model's state of each.
    """

    reading: Reading
    pairs: PairedStates | None
    rows: Tensor

    @staticmethod
    def prepare(state_map: StateMap, probe: Probe, states: HostStates | None) -> "_Seat":
        nothing = torch.zeros(0, dtype=torch.long)
        if states is None:
            plain = Reading(state_map.matrix, torch.zeros(len(state_map.matrix)))
            return _Seat(plain, None, nothing)
        reading = moment_matched(state_map, probe.mean, probe.std, states.hidden.float())
        rows, host_rows = same_bytes(probe.document_index, probe.byte_ends, states)
        if len(rows) < MIN_PAIRS:
            return _Seat(reading, None, nothing)
        fold = probe.document_index[rows] % 2
        return _Seat(reading, PairedStates(states.hidden[host_rows], fold), rows)

    def shuffled(self, seed: int) -> "_Seat":
        """The control: each host state is paired with the small state of another position."""
        generator = torch.Generator().manual_seed(seed)
        return replace(self, rows=self.rows[torch.randperm(len(self.rows), generator=generator)])

    @property
    def paired_positions(self) -> int:
        return len(self.rows)

    def read(self, features: Tensor, offset: Tensor, probe_features: Tensor) -> Reading:
        reading = compose(features, offset, self.reading)
        if self.pairs is None:
            return reading
        return self.pairs.calibrate(reading, probe_features[self.rows])
