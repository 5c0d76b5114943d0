"""Which windows each training step sees, and how fast it learns. Pure."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

_RISE = 0.3
_FIRST_DIVISOR = 25.0
_LAST_DIVISOR = 1e4


@dataclass(frozen=True)
class Schedule:
    """Which windows each step sees, and after which steps the held-out text is scored.

    All of it follows from these numbers, so that a resumed run needs to know its step only.

    Attributes:
        windows: Windows there are.
        windows_per_epoch: Windows that an epoch takes, drawn anew for each epoch.
        batch_windows: Windows in a step; the last step of an epoch may have fewer.
        epochs: Number of epochs.
        validations: Validations an epoch, the last of them at its end; 0 for none.
        peak: Highest learning rate.
        patience: Validations without improvement after which training stops.
        seed: Seed of the order and of dropout.
    """

    windows: int
    windows_per_epoch: int
    batch_windows: int
    epochs: int
    validations: int
    peak: float
    patience: int
    seed: int

    @property
    def steps_per_epoch(self) -> int:
        """Steps in an epoch."""
        return -(-self.windows_per_epoch // self.batch_windows)

    @property
    def steps(self) -> int:
        """Steps in all, if nothing stops them early."""
        return self.epochs * self.steps_per_epoch

    def rows(self, step: int) -> Tensor:
        """Windows of a step (counted from 0), shape [batch]."""
        epoch, place = divmod(step, self.steps_per_epoch)
        generator = torch.Generator().manual_seed(step_seed(self.seed, -1 - epoch))
        order = torch.randperm(self.windows, generator=generator)[: self.windows_per_epoch]
        return order[place * self.batch_windows : (place + 1) * self.batch_windows]

    def validates_after(self, steps: int) -> bool:
        """Whether the held-out text is scored when so many steps, at least 1, are done."""
        place = (steps - 1) % self.steps_per_epoch + 1
        due = [n * self.validations // self.steps_per_epoch for n in (place - 1, place)]
        return due[1] > due[0]


def step_seed(seed: int, step: int) -> int:
    """Mix a run's seed and a step's number into the seed of that step's randomness."""
    return (seed * 1_000_003 + step) % 2**63


def one_cycle(step: int, steps: int, peak: float) -> float:
    """Learning rate of a step: cosine up over the first 30 %, cosine down to nearly nothing.

    From 4 steps on this is torch's OneCycleLR; fewer steps start at the peak, where that would
    never reach it.

    Args:
        step: Number of the step, from 0.
        steps: Steps in all.
        peak: Highest learning rate.
    """
    low = peak / _FIRST_DIVISOR
    top = max(_RISE * steps - 1, 0.0)
    if step < top:
        return _cosine(low, peak, step / top)
    return _cosine(peak, low / _LAST_DIVISOR, (step - top) / max(steps - 1 - top, 1.0))


def _cosine(start: float, end: float, share: float) -> float:
    return end + (start - end) / 2 * (1 + math.cos(math.pi * share))
