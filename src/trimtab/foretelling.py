"""How far a reference's states foretell by what its expert's differ from them."""

from dataclasses import dataclass

import torch
from torch import Tensor

RANK_SHARE = 8
"""One direction is foretold for so many numbers of a state; further ones say little."""

RIDGES = (1e-4, 1e-3, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 1e4)
"""Strengths to choose from, over the mean square of a direction; the last leaves the mean alone."""


@dataclass(frozen=True)
class Foretelling:
    """An affine guess of the expert's state: h + up @ down @ (h - mean) + offset.

    Attributes:
        down: Shape [rank, hidden].
        up: Shape [hidden, rank].
        mean: Of the reference's states, shape [hidden].
        offset: Mean difference, shape [hidden].
    """

    down: Tensor
    up: Tensor
    mean: Tensor
    offset: Tensor

    def states(self, reference: Tensor) -> Tensor:
        """The expert's states as they are foretold, of the reference's shape [rows, hidden]."""
        return reference + (reference - self.mean) @ self.down.T @ self.up.T + self.offset


def foretelling_for(reference: Tensor, difference: Tensor) -> tuple[Foretelling, Tensor]:
    """Fit a guess by ridge regression, and say what it leaves of states that it has not seen.

    The strength is the one that foretells each state best from all others, which for a linear fit
    needs no second one: what is left of state i is its residual over 1 - H_ii, where H maps the
    differences to their fit (the PRESS statistic, Allen 1974). Then the directions that the fit
    uses least are left out.

    Args:
        reference: Some states, at least one, shape [rows, hidden].
        difference: By what the expert's differ, of the same shape.

    Returns:
        The guess in float32; and what it would leave of each difference if it had been fitted
        without it, in float64, shape [rows, hidden].
    """
    reference, difference = reference.double(), difference.double()
    mean, offset = reference.mean(0), difference.mean(0)
    left, sizes, right = torch.linalg.svd(reference - mean, full_matrices=False)
    known = left.T @ (difference - offset)
    unit = sizes.square().mean().clamp_min(torch.finfo(sizes.dtype).tiny)

    def fitted(ridge: float) -> tuple[Tensor, Tensor]:
        kept = sizes.square() / (sizes.square() + ridge * unit)
        influence = 1 / len(left) + left.square() @ kept
        fit = left @ (kept[:, None] * known)
        residual = difference - offset - fit
        return fit, residual / (1 - influence).clamp_min(1e-6)[:, None]

    ridge = min(RIDGES, key=lambda strength: float(fitted(strength)[1].square().sum()))
    fit, unseen = fitted(ridge)
    rank = max(1, reference.shape[1] // RANK_SHARE)
    up = torch.linalg.svd(fit, full_matrices=False)[2][:rank].T
    down = up.T @ known.T @ ((sizes / (sizes.square() + ridge * unit))[:, None] * right)
    guess = Foretelling(*(part.float() for part in (down, up, mean, offset)))
    return guess, unseen + fit - fit @ up @ up.T
