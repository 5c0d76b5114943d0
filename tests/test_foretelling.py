"""What a reference's states foretell, against fits without each state in turn."""

import pytest
import torch
from torch import Tensor

from trimtab.foretelling import RANK_SHARE, RIDGES, foretelling_for

HIDDEN = 16


def states(rows: int, noise: float, seed: int = 0) -> tuple[Tensor, Tensor]:
    """States, and differences that two of their directions foretell, and noise does not."""
    dice = torch.Generator().manual_seed(seed)
    reference = 2 + torch.randn(rows, HIDDEN, generator=dice) * torch.logspace(0, -1, HIDDEN)
    down, up = (torch.randn(*s, generator=dice) for s in ((HIDDEN, 2), (2, HIDDEN)))
    return reference, reference @ down @ up + noise * torch.randn(rows, HIDDEN, generator=dice)


def ridge_fit(reference: Tensor, difference: Tensor, strength: Tensor) -> tuple[Tensor, ...]:
    """Ridge regression by its normal equations: the map, and both means."""
    mean, offset = reference.mean(0), difference.mean(0)
    centred = reference - mean
    gram = centred.T @ centred + strength * torch.eye(HIDDEN, dtype=centred.dtype)
    return torch.linalg.solve(gram, centred.T @ (difference - offset)), mean, offset


@pytest.mark.parametrize("rows", [9, 40])
def test_what_is_left_is_what_a_fit_without_the_state_leaves(
    rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trimtab.foretelling.RIDGES", (0.3,))
    # All directions, so that nothing else is left out.
    monkeypatch.setattr("trimtab.foretelling.RANK_SHARE", 1)
    reference, difference = (side.double() for side in states(rows, 0.5))
    guess, left = foretelling_for(reference, difference)
    sizes = torch.linalg.svdvals(reference - reference.mean(0))
    strength = 0.3 * sizes.square().mean()
    for row in range(rows):
        others = torch.arange(rows) != row
        weights, mean, offset = ridge_fit(reference[others], difference[others], strength)
        expected = difference[row] - offset - (reference[row] - mean) @ weights
        torch.testing.assert_close(left[row], expected, rtol=1e-8, atol=1e-9)
    weights, mean, offset = ridge_fit(reference, difference, strength)
    expected = reference + offset + (reference - mean) @ weights
    torch.testing.assert_close(guess.states(reference.float()), expected.float())


def test_what_can_be_foretold_is_and_noise_is_not() -> None:
    reference, difference = states(400, 0.1)
    guess, left = foretelling_for(reference[:300], (difference)[:300])
    assert guess.down.shape == (HIDDEN // RANK_SHARE, HIDDEN)
    error = (reference + difference - guess.states(reference))[300:].square().mean()
    assert error < 1.3 * 0.1**2
    assert float(left.square().mean()) == pytest.approx(float(error), rel=0.3)
    # Where nothing can be foretold, the mean difference alone is.
    noise = 3 + torch.randn(400, HIDDEN, generator=torch.Generator().manual_seed(5))
    guess, _ = foretelling_for(reference[:40], noise[:40])
    torch.testing.assert_close(
        guess.states(reference) - reference, guess.offset.expand(400, -1), rtol=0, atol=0.05
    )


@pytest.mark.parametrize("rows", [1, 2])
def test_a_state_or_two_foretell_their_mean(rows: int) -> None:
    reference, difference = states(rows, 0.1)
    guess, left = foretelling_for(reference, difference)
    assert torch.isfinite(left).all()
    assert torch.isfinite(guess.states(reference)).all()
    assert max(RIDGES) > 1e3
    torch.testing.assert_close(guess.offset, difference.mean(0))
