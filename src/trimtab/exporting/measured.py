"""The states of the probe text that an export is fitted on and judged by."""

from dataclasses import dataclass

import torch
from torch import Tensor

from trimtab.backends.hf import HFModel
from trimtab.errors import AdapterError
from trimtab.exporting.fidelity import Fidelity, Logits, compare
from trimtab.exporting.linear import ConstantReading, Shift, constant_reading, without_offset
from trimtab.steering.host_states import HostStates

JUDGED_POSITIONS = 512
"""Positions that judge an export, evenly spread: each needs several rows of all logits."""


@dataclass(frozen=True)
class ProbeStates:
    """A host's states on the probe text, in two parts that share no document where there are three.

    Attributes:
        fitted: States that the constant reading is fitted on, shape [positions, hidden].
        half: 0 or 1 for each of them, [positions].
        judged: States that judge the export, shape [at most JUDGED_POSITIONS, hidden].
    """

    fitted: Tensor
    half: Tensor
    judged: Tensor

    def constant(self) -> ConstantReading:
        """The reading of a constant from these states."""
        return constant_reading(self.fitted, self.half)


def split_states(states: HostStates) -> ProbeStates:
    """Keep every third document apart, to judge what the other two thirds fitted.

    Raises:
        AdapterError: The host read no token of the probe text.
    """
    hidden, part = states.hidden.float(), states.document_index % 3
    if not len(hidden):
        raise AdapterError(
            "the adapter's general text has no token for this host, so that an export cannot be"
            " measured",
            hint="record with more general text (--general), and fit again",
        )
    judged = part == 2
    if not judged.any() or judged.all():
        part = torch.arange(len(hidden)) * 3 // len(hidden)
        judged = part == 2
    if not judged.any():
        judged = torch.ones_like(judged)
    chosen = hidden[judged]
    steps = torch.linspace(0, len(chosen) - 1, min(len(chosen), JUDGED_POSITIONS)).long()
    rest = ~judged if not judged.all() else judged
    return ProbeStates(hidden[rest], part[rest] % 2, chosen[steps])


@dataclass(frozen=True)
class Measured:
    """What was measured when an export was made.

    Attributes:
        export: The mounted head against the export as it lies on disk.
        head: The mounted head against the bare host: how much there is to get wrong.
        offset: The mounted head against the same without its constant part.
    """

    export: Fidelity
    head: Fidelity
    offset: Fidelity


def measure(host: HFModel, shift: Shift, exported: Logits, judged: Tensor) -> Measured:
    """Compare the mounted head with its export, with the bare host, and without its offset.

    Args:
        host: The host.
        shift: The mounted head's.
        exported: Logits of the export.
        judged: States, shape [positions, hidden].
    """

    def steered(hidden: Tensor) -> Tensor:
        return host_logits(host, hidden) + shift(hidden)

    def linear_part(hidden: Tensor) -> Tensor:
        return host_logits(host, hidden) + without_offset(shift)(hidden)

    return Measured(
        compare(steered, exported, judged),
        compare(steered, lambda hidden: host_logits(host, hidden), judged),
        compare(steered, linear_part, judged),
    )


def host_logits(host: HFModel, hidden: Tensor) -> Tensor:
    """The host's own logits in float32 on the CPU, of states that may lie elsewhere."""
    with torch.inference_mode():
        weight = host.unembedding.weight
        return host.unembedding.logits(hidden.to(weight.device)).float().cpu()
