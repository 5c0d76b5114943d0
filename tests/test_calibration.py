"""Calibration by paired states, against ridge regressions written out one by one."""

import pytest
import torch
from torch import Tensor

from trimtab.anchors import Reading
from trimtab.calibration import RIDGES, PairedStates


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def oracle(reading: Reading, states: Tensor, target: Tensor, fold: Tensor) -> Reading:
    errors = dict.fromkeys(RIDGES, 0.0)
    for half in (0, 1):
        rows, held_out = fold != half, fold == half
        for ridge in RIDGES:
            fitted = corrected(reading, states[rows], target[rows], ridge)
            errors[ridge] += float(((fitted(states[held_out]) - target[held_out]) ** 2).sum())
    return corrected(reading, states, target, min(RIDGES, key=lambda ridge: errors[ridge]))


def corrected(reading: Reading, states: Tensor, target: Tensor, ridge: float) -> Reading:
    states, target = states.double(), target.double()
    mapped = states @ reading.matrix.double().T + reading.bias.double()
    x, y = mapped - mapped.mean(0), target - target.mean(0)
    slope = ((x * y).sum(0) / (x**2).sum(0)).clamp_min(0)
    std = states.std(0)
    standard = (states - states.mean(0)) / std
    gram = standard.T @ standard / len(states) + ridge * torch.eye(states.shape[1])
    residual = torch.linalg.lstsq(gram, standard.T @ (y - x * slope) / len(states)).solution
    matrix = slope[:, None] * reading.matrix.double() + (residual / std[:, None]).T
    return Reading(matrix.float(), (target.mean(0) - matrix @ states.mean(0)).float())


@pytest.mark.parametrize("noise", [0.02, 0.5, 20.0])
def test_calibration_is_the_ridge_regression_that_the_other_half_likes_best(noise: float) -> None:
    # States far from zero and of very different sizes, as those of real models are.
    states = (draw(900, 12) * 10 ** torch.linspace(-1, 2, 12) + 300).float()
    reading = Reading(draw(5, 12, seed=2).float(), draw(5, seed=3).float())
    other = Reading(draw(5, 12, seed=4).float(), draw(5, seed=5).float())
    truth = other(states)
    target = truth + noise * truth.std(0) * draw(900, 5, seed=6).float()
    found = PairedStates(states, halves(900)).calibrate(reading, target)
    expected = oracle(reading, states, target, halves(900))
    assert explained(found(states), expected(states)) > 1 - 1e-6
    scale = expected.matrix.abs().amax(0)
    torch.testing.assert_close(found.matrix / scale, expected.matrix / scale, atol=2e-3, rtol=0)


def halves(count: int) -> Tensor:
    return (torch.arange(count) // 50) % 2


def explained(found: Tensor, truth: Tensor) -> float:
    return 1 - float(((found - truth) ** 2).sum() / ((truth - truth.mean(0)) ** 2).sum())


def test_calibration_finds_a_linear_relation() -> None:
    states = draw(4000, 8).float() * 4 + 1
    truth = Reading(draw(5, 8, seed=2).float(), draw(5, seed=3).float())
    wrong = Reading(draw(5, 8, seed=4).float(), torch.zeros(5))
    found = PairedStates(states, halves(4000)).calibrate(wrong, truth(states))
    fresh = draw(500, 8, seed=9).float() * 4 + 1
    # The weakest ridge on standardised states still shrinks by 0.1 / 1.1 at most.
    assert explained(found(fresh), truth(fresh)) > 0.98
    exact = PairedStates(states, halves(4000)).calibrate(truth, truth(states))
    torch.testing.assert_close(exact.matrix, truth.matrix, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(exact.bias, truth.bias, atol=1e-2, rtol=1e-2)


def test_calibration_on_noise_shrinks_each_feature_to_its_slope() -> None:
    states = draw(600, 100).float()
    reading = Reading(draw(3, 100, seed=2).float(), draw(3, seed=3).float())
    mapped = reading(states)
    deviation = mapped.std(0)
    target = 0.5 * mapped + 2 * deviation * draw(600, 3, seed=4).float()
    found = PairedStates(states, halves(600)).calibrate(reading, target)
    x, y = mapped - mapped.mean(0), target - target.mean(0)
    slope = (x * y).sum(0) / (x**2).sum(0)
    torch.testing.assert_close(found.matrix, slope[:, None] * reading.matrix, atol=2e-3, rtol=0)
    torch.testing.assert_close(found(states).mean(0), target.mean(0), atol=1e-3, rtol=1e-3)


def test_calibration_never_turns_a_feature_round() -> None:
    states = draw(400, 30).float()
    reading = Reading(draw(2, 30, seed=2).float(), torch.zeros(2))
    one_document = torch.zeros(400, dtype=torch.long)
    found = PairedStates(states, one_document).calibrate(reading, -reading(states))
    assert found.matrix.abs().max() < 1e-4


def test_one_document_is_calibrated_by_slopes_alone() -> None:
    states = draw(60, 50).float()
    reading = Reading(draw(2, 50, seed=2).float(), torch.zeros(2))
    target = draw(60, 2, seed=5).float()
    for fold in (torch.zeros(60, dtype=torch.long), torch.ones(60, dtype=torch.long)):
        found = PairedStates(states, fold).calibrate(reading, target)
        x, y = reading(states) - reading(states).mean(0), target - target.mean(0)
        slope = ((x * y).sum(0) / (x**2).sum(0)).clamp_min(0)
        torch.testing.assert_close(
            found.matrix, slope[:, None] * reading.matrix, atol=1e-4, rtol=1e-4
        )
