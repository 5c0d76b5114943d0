"""Readings of a host's states, corrected by the small model's own at the same bytes. Pure.

The data-free map is right in the directions that the vocabulary shows and blind elsewhere.
"""

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from trimtab.anchors import Reading

RIDGES = (1e6, 10.0, 3.0, 1.0, 0.3, 0.1)
"""Ridges that calibration chooses from; the first leaves the slopes alone and wins a tie."""


@dataclass(frozen=True)
class _Moments:
    """Sums over some states: how many, the states, and their outer products."""

    count: int
    first: Tensor
    second: Tensor

    @staticmethod
    def of(states: Tensor) -> "_Moments":
        return _Moments(len(states), states.sum(0), states.T @ states)

    def plus(self, other: "_Moments") -> "_Moments":
        return _Moments(
            self.count + other.count, self.first + other.first, self.second + other.second
        )


@final
class PairedStates:
    """A host's states where the small model has read the same bytes, in two halves.

    What all features' calibrations need of them is computed once.
    """

    def __init__(self, states: Tensor, fold: Tensor) -> None:
        """Take the moments of both halves.

        Args:
            states: Shape [pairs, hidden of host].
            fold: 0 or 1, the half that each pair belongs to (halves share no document), [pairs].
        """
        states = states.float()
        # About their mean: products of large means would drown what varies.
        self._mean = states.mean(0)
        self._centred = states - self._mean
        self._halves = [fold == half for half in (0, 1)]
        self._moments = [_Moments.of(self._centred[half]) for half in self._halves]

    def calibrate(self, reading: Reading, target: Tensor) -> Reading:
        """Correct a reading.

        Each feature is shrunk to its regression slope (correlation times ratio of deviations, the
        best that moments alone can do), and what is left is predicted from the host's standardised
        state by ridge regression, whose strength is chosen by two-fold cross-validation; where a
        half is empty, as with a single document, only the slopes are fitted.

        Args:
            reading: Data-free reading of the features.
            target: The small model's own features at the same bytes, shape [pairs, features].
        """
        here = Reading(reading.matrix, reading(self._mean))
        ridges = torch.tensor(RIDGES)
        if min(moments.count for moments in self._moments) < 2:
            ridges = ridges[:1]
        if len(ridges) > 1:
            errors = torch.zeros(len(ridges))
            for number, held_out in enumerate(self._halves):
                others, moments = self._halves[1 - number], self._moments[1 - number]
                fitted = _corrected(
                    here, self._centred[others], moments, target[others], ridges.tolist()
                )
                states, truth = self._centred[held_out], target[held_out]
                errors += torch.stack([((each(states) - truth) ** 2).sum() for each in fitted])
            ridges = ridges[errors.argmin()][None]
        whole = self._moments[0].plus(self._moments[1])
        (best,) = _corrected(here, self._centred, whole, target, ridges.tolist())
        return Reading(best.matrix, best.bias - best.matrix @ self._mean)


def _corrected(
    reading: Reading,
    states: Tensor,
    moments: _Moments,
    target: Tensor,
    ridges: list[float],
) -> list[Reading]:
    """A reading corrected on some states, with each ridge."""
    mapped, mean = reading(states), moments.first / moments.count
    x, y = mapped - mapped.mean(0), target - target.mean(0)
    slope = ((x * y).mean(0) / (x**2).mean(0).clamp_min(1e-12)).clamp_min(0.0)
    covariance = moments.second / moments.count - torch.outer(mean, mean)
    unbiased = moments.count / max(moments.count - 1, 1)
    std = (covariance.diagonal() * unbiased).clamp_min(0.0).sqrt().clamp_min(1e-6)
    gram = covariance / torch.outer(std, std)
    # What is left has no mean, so that that of the states is of no account.
    left = states.T @ (y - x * slope) / moments.count / std[:, None]
    found = []
    for ridge in ridges:
        triangle = torch.linalg.cholesky(gram + ridge * torch.eye(len(gram)))
        residual = torch.cholesky_solve(left, triangle).T / std
        matrix = slope[:, None] * reading.matrix + residual
        found.append(Reading(matrix, target.mean(0) - matrix @ mean))
    return found
