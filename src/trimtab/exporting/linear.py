"""A mounted head as weights: what of it a low-rank matrix says, and its constant part. Pure."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from trimtab.carriers.head import MountedHead

LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""Ranks that `engines.VLLM` has kernels for; a LoRA is padded with zeros to the next of them."""

CONSTANT_RIDGES = (0.0, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2)
"""Ridges, as shares of the mean square of a state's features, that the constant reading is
chosen from."""

STATE_ROUNDING = 2.0**-9
"""Largest relative error of a state's feature in bfloat16, as engines compute it."""


@dataclass(frozen=True)
class Shift:
    """What a mounted head adds to its host's logits: up @ down @ h + offset.

    Attributes:
        up: Shape [vocab, rank]; the strength is in it.
        down: Shape [rank, hidden].
        offset: The same at every position, shape [vocab]; the strength is in it.
    """

    up: Tensor
    down: Tensor
    offset: Tensor

    def __call__(self, hidden: Tensor) -> Tensor:
        """The shift in float32, shape [..., vocab], of states of shape [..., hidden]."""
        return hidden.float() @ self.down.T @ self.up.T + self.offset


@dataclass(frozen=True)
class Lora:
    """A low-rank matrix beside a host's unembedding: W becomes W + lora_b @ lora_a.

    Attributes:
        lora_a: Shape [rank, hidden].
        lora_b: Shape [vocab, rank].
    """

    lora_a: Tensor
    lora_b: Tensor

    @property
    def rank(self) -> int:
        """Rank with its padding."""
        return len(self.lora_a)

    def padded(self) -> "Lora":
        """The same matrix with zeros up to the next of `LORA_RANKS`; unchanged beyond the last."""
        rank = next((allowed for allowed in LORA_RANKS if allowed >= self.rank), self.rank)
        spare = rank - self.rank
        return Lora(
            torch.nn.functional.pad(self.lora_a, (0, 0, 0, spare)).contiguous(),
            torch.nn.functional.pad(self.lora_b, (0, spare)).contiguous(),
        )


@dataclass(frozen=True)
class ConstantReading:
    """A linear functional of a host's state that is as nearly 1 as the states allow.

    Attributes:
        row: v, shape [hidden]; v @ h is about 1.
        rms_error: Root mean square of v @ h - 1 on states that did not fit it.
    """

    row: Tensor
    rms_error: float


def shift_of(head: MountedHead, strength: float) -> Shift:
    """Gather a mounted head's constants: rows (R h + r) + bias = rows R h + (rows r + bias).

    Args:
        head: The head on its host.
        strength: How far to follow it; multiplies the whole shift.
    """
    rows = strength * head.rows.float()
    offset = rows @ head.reading.bias.float() + strength * head.bias.float()
    return Shift(rows, head.reading.matrix.float(), offset)


def constant_reading(hidden: Tensor, half: Tensor) -> ConstantReading:
    """Find the linear functional of a host's states that comes nearest to 1.

    A matrix has no constant part, so the head's offset is carried by a feature that hardly varies:
    v = argmin mean (v @ h - 1)^2 + v'D v + ridge |v|^2 = (H'H / n + D + ridge)^-1 mean(h), without
    centring, since it is the mean that it reads. D is the variance of the states' rounding in
    bfloat16; without it v would lean on differences that drown in an engine's arithmetic.

    Behind a LayerNorm with bias b and gain g the features (h - b) / g sum to 0, so that
    sum h / g = sum b / g is such a feature, and exact but for rounding. Behind an RMSNorm none is;
    how near the best comes depends on how strong the states' common direction is.

    Args:
        hidden: States, shape [positions, hidden].
        half: 0 or 1 for each position, [positions]; each half judges what the other fitted, and
            the ridge that does best is kept.
    """
    states = hidden.double()
    sides = [half == side for side in (0, 1)]
    if min(int(side.sum()) for side in sides) == 0:
        sides = [torch.ones_like(half, dtype=torch.bool)] * 2
    errors: dict[float, float] = {}
    for ridge in CONSTANT_RIDGES:
        missed = [
            states[held_out] @ _solved(states[fitted], ridge) - 1
            for fitted, held_out in (sides, sides[::-1])
        ]
        errors[ridge] = float(torch.cat(missed).square().mean().sqrt())
    ridge = min(errors, key=lambda candidate: errors[candidate])
    return ConstantReading(_solved(states, ridge).float(), errors[ridge])


def _solved(states: Tensor, ridge: float) -> Tensor:
    gram = states.T @ states / len(states)
    squares = gram.diagonal().clone()
    gram.diagonal().add_(STATE_ROUNDING**2 * squares + ridge * squares.mean())
    return torch.linalg.solve(gram, states.mean(0))


def as_lora(shift: Shift, *, scale: float, constant: ConstantReading | None) -> Lora:
    """Write a shift as a LoRA on the unembedding.

    Args:
        shift: The head's.
        scale: What the host multiplies W h by; lora_b is divided by it.
        constant: Carries the offset as one more rank; None leaves the offset out.
    """
    up, down = shift.up, shift.down
    if constant is not None:
        up = torch.cat([up, shift.offset[:, None]], 1)
        down = torch.cat([down, constant.row[None]], 0)
    return Lora(down.contiguous(), (up / scale).contiguous())


def without_offset(shift: Shift) -> Shift:
    """The part of a shift that depends on the state."""
    return replace(shift, offset=torch.zeros_like(shift.offset))
