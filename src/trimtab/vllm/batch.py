"""The batch of each of vLLM's two runners, as logits processors are shown it. Needs no vLLM."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor

from trimtab.carriers.memory import CONTEXT_BYTES
from trimtab.vllm.plugin import Plugin
from trimtab.vllm.requests import SteeredRequest
from trimtab.vllm.spans import spans_by_ends, spans_by_texts

LAST_TOKENS = 4 * CONTEXT_BYTES
"""Last tokens in which the last CONTEXT_BYTES bytes are sought: some may stand for no text."""


@dataclass(frozen=True)
class Known:
    """A request of the first runner, whether it is steered or not.

    Attributes:
        prompt: Token ids.
        output: Token ids so far; vLLM's own list, which grows.
        steered: How it is steered, if it is.
    """

    prompt: Sequence[int]
    output: Sequence[int]
    steered: SteeredRequest | None

    @property
    def token_ids(self) -> list[int]:
        """The whole text."""
        return [*self.prompt, *self.output]

    @property
    def last_ids(self) -> list[int]:
        """Its last tokens."""
        return [*self.prompt[-LAST_TOKENS:], *self.output[-LAST_TOKENS:]]


def steer_v1(plugin: Plugin, known: Mapping[int, Known], logits: Tensor) -> None:
    """Steer a step of the first runner, in place.

    Row i of the logits is that of request i. A request whose prompt is not wholly read has one
    too, which vLLM throws away.

    Args:
        plugin: What steers.
        known: All requests of the batch, by row.
        logits: Shape [requests, vocab].
    """
    steered = {row: one.steered for row, one in known.items() if one.steered is not None}
    if not steered:
        return
    read, sampled = plugin.states(len(logits))
    if any(request.weights is None for request in steered.values()):
        texts = [known[row].token_ids for row in range(len(logits))]
        plugin.hear(steered, read, spans_by_texts(read, texts, sampled) if read else (), sampled)
    rows = [
        plugin.row(row, request, known[row].last_ids)
        for row, request in steered.items()
        if request.weights is not None
    ]
    plugin.steer(logits, sampled, rows)


@final
class Slots:
    """The requests of the second runner, which tells their tokens once they are in a batch."""

    def __init__(self, plugin: Plugin, states: Any) -> None:
        """Begin without requests.

        Args:
            plugin: What steers.
            states: vLLM's LogitsProcRequestState: token ids and lengths of prompts by slot.
        """
        self._plugin = plugin
        self._states = states
        self._new: dict[int, Any] = {}
        self._steered: dict[int, SteeredRequest] = {}

    def begin(self, slot: int, params: Any) -> bool:
        """Take a request into a slot, whatever was there; whether it is steered.

        Args:
            slot: Which.
            params: Its SamplingParams.
        """
        self._new.pop(slot, None)
        self._steered.pop(slot, None)
        if self._plugin.is_steered(params):
            self._new[slot] = params
        return slot in self._new

    def steered(self, slots: Sequence[int]) -> dict[int, SteeredRequest]:
        """The steered requests of a batch by their rows, of which each belongs to a slot."""
        for slot in self._new.keys() & set(slots):
            length = int(self._states.prompt_len.np[slot])
            prompt = self._token_ids[slot, :length].tolist()
            request = self._plugin.request(self._new.pop(slot), prompt)
            if request is not None:
                self._steered[slot] = request
        return {row: self._steered[slot] for row, slot in enumerate(slots) if slot in self._steered}

    def last_ids(self, slots: Sequence[int], ends: Sequence[int]) -> list[list[int]]:
        """The last tokens of some slots.

        Args:
            slots: Which.
            ends: Position of each one's last token.
        """
        columns = torch.tensor(ends)[:, None] - torch.arange(LAST_TOKENS).flip(0)
        device = self._token_ids.device
        places = torch.tensor(slots)[:, None].to(device), columns.clamp_min(0).to(device)
        found = self._token_ids[places].tolist()
        return [ids[-min(end + 1, LAST_TOKENS) :] for ids, end in zip(found, ends, strict=True)]

    @property
    def _token_ids(self) -> Tensor:
        return self._states.all_token_ids.gpu


def steer_v2(plugin: Plugin, slots: Slots, logits: Tensor, context: Any) -> None:
    """Steer a step of the second runner, in place.

    Args:
        plugin: What steers.
        slots: The requests.
        logits: Shape [requests, vocab].
        context: vLLM's LogitsContext: which row belongs to which slot, and the position of the
            last token that was read for it.
    """
    order = [int(slot) for slot in context.idx_mapping_np]
    steered = slots.steered(order)
    if not steered:
        return
    read, sampled = plugin.states(len(logits))
    ends = context.pos.tolist()
    if any(request.weights is None for request in steered.values()):
        plugin.hear(steered, read, spans_by_ends(read, ends) if read else (), sampled)
    chosen = [row for row, request in steered.items() if request.weights is not None]
    if not chosen:
        return
    lasts = slots.last_ids([order[row] for row in chosen], [ends[row] for row in chosen])
    rows = [plugin.row(row, steered[row], ids) for row, ids in zip(chosen, lasts, strict=True)]
    plugin.steer(logits, sampled, rows)
