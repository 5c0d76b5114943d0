"""Anchors and the closed-form map, against least squares written out."""

import pytest
import torch
from torch import Tensor

from trimtab.anchors import (
    UNSEEN_COUNT,
    Reading,
    choose_anchors,
    compose,
    fit_map,
    moment_matched,
    pair_anchors,
)
from trimtab.unembedding import Unembedding
from trimtab.vocab import Vocabulary


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def frequencies(count: int, seed: int = 1) -> Tensor:
    return torch.rand(count, generator=torch.Generator().manual_seed(seed)).double() ** 3 + 1e-3


def test_the_map_is_the_weighted_ridge_solution() -> None:
    rows, host_rows, weights = draw(50, 6), draw(50, 9, seed=2), frequencies(50)
    found = fit_map(rows, host_rows, weights, ridge=0.03)

    share = (weights / weights.sum())[:, None]
    small, host = rows - (share * rows).sum(0), host_rows - (share * host_rows).sum(0)
    penalty = 0.03 * (share * small**2).sum() / 6
    left = torch.cat([share.sqrt() * small, penalty.sqrt() * torch.eye(6)])
    right = torch.cat([share.sqrt() * host, torch.zeros(6, 9)])
    oracle = torch.linalg.lstsq(left, right).solution
    torch.testing.assert_close(found.matrix, oracle)
    left_over = (share * (small @ oracle - host) ** 2).sum() / (share * host**2).sum()
    assert found.r_squared == pytest.approx(1 - float(left_over))
    assert found.shared_tokens == 50


def test_a_model_maps_to_itself_and_through_a_basis_change() -> None:
    rows, weights = draw(40, 5), frequencies(40)
    same = fit_map(rows, rows, weights, ridge=1e-12)
    torch.testing.assert_close(same.matrix, torch.eye(5).double())
    assert same.r_squared == pytest.approx(1)
    turn = torch.linalg.qr(draw(5, 5, seed=3)).Q
    turned = fit_map(rows, rows @ turn, weights, ridge=1e-12)
    torch.testing.assert_close(turned.matrix, turn)


def test_a_constant_row_changes_nothing() -> None:
    rows, host_rows, weights = draw(30, 4), draw(30, 6, seed=2), frequencies(30)
    plain = fit_map(rows, host_rows, weights, ridge=1e-3)
    moved = fit_map(rows + draw(4, seed=4), host_rows + draw(6, seed=5), weights, ridge=1e-3)
    torch.testing.assert_close(plain.matrix, moved.matrix)
    torch.testing.assert_close(plain.r_squared, moved.r_squared)
    scaled = fit_map(rows, host_rows, 7 * weights, ridge=1e-3)
    torch.testing.assert_close(plain.matrix, scaled.matrix)


def test_frequent_tokens_rule_the_map() -> None:
    rows, host_rows = draw(60, 4), draw(60, 4, seed=2)
    host_rows[:20] = rows[:20]
    weights = torch.where(torch.arange(60) < 20, 1e6, 1.0).double()
    assert torch.dist(fit_map(rows, host_rows, weights, ridge=1e-9).matrix, torch.eye(4)) < 1e-3
    assert torch.dist(fit_map(rows, host_rows, weights**0, ridge=1e-9).matrix, torch.eye(4)) > 0.3


def test_shuffled_anchors_explain_little() -> None:
    rows, weights = draw(300, 6), frequencies(300)
    host_rows = rows @ draw(6, 9, seed=2)
    assert fit_map(rows, host_rows, weights, ridge=1e-6).r_squared > 0.999
    other = torch.randperm(300, generator=torch.Generator().manual_seed(3))
    assert fit_map(rows, host_rows[other], weights, ridge=1e-6).r_squared < 0.2


def test_anchors_are_the_most_frequent_strings() -> None:
    vocabulary = Vocabulary((b"a", None, b"b", b"a", b"c", b"", b"d"))
    counts = torch.tensor([0, 99, 5, 50, 0, 70, 7])
    unembedding = Unembedding(torch.arange(14.0).reshape(7, 2), scale=0.5)
    found = choose_anchors(vocabulary, unembedding, counts, 3)
    # 3 is a second id of b"a", 1 and 5 stand for no text, and 0 comes before 4 by id.
    assert found.strings == (b"d", b"b", b"a")
    assert torch.equal(found.rows, unembedding.weight[[6, 2, 0]] * 0.5)
    assert found.weights.tolist() == pytest.approx([7 + UNSEEN_COUNT, 5 + UNSEEN_COUNT, 0.05])
    assert len(choose_anchors(vocabulary, unembedding, counts, 99).strings) == 4


def test_pairs_are_equal_strings() -> None:
    host = Vocabulary((None, b"b", b"x", b"a", b"b"))
    mine, theirs = pair_anchors((b"a", b"q", b"b"), host)
    assert mine.tolist() == [0, 2]
    assert theirs.tolist() == [3, 1]
    mine, theirs = pair_anchors((b"q",), host)
    assert len(mine) == len(theirs) == 0 and mine.dtype == theirs.dtype == torch.long


def test_matched_moments_are_the_small_models() -> None:
    states = draw(500, 7).float() * torch.arange(1, 8) + 3
    state_map = fit_map(draw(40, 4), draw(40, 7, seed=2), frequencies(40), ridge=1e-3)
    state_map = type(state_map)(state_map.matrix.float(), state_map.r_squared, 40)
    mean, std = draw(4, seed=5).float(), draw(4, seed=6).float().abs() + 0.1
    mapped = moment_matched(state_map, mean, std, states)(states)
    torch.testing.assert_close(mapped.mean(0), mean, atol=1e-4, rtol=0)
    torch.testing.assert_close(mapped.std(0), std)
    plain = states @ state_map.matrix.T
    correlation = torch.corrcoef(torch.cat([plain[:, :1], mapped[:, :1]], 1).T)[0, 1]
    assert correlation == pytest.approx(1, abs=1e-4)


def test_composed_features_are_features_of_what_is_read() -> None:
    reading = Reading(draw(4, 6).float(), draw(4, seed=2).float())
    features, offset = draw(3, 4, seed=3).float(), draw(4, seed=4).float()
    states = draw(2, 5, 6, seed=5).float()
    oracle = (reading(states) - offset) @ features.T
    torch.testing.assert_close(compose(features, offset, reading)(states), oracle)
    assert reading(states.half()).dtype == torch.float32
