"""Bits per byte by hand, and bootstrap errors against the normal approximation."""

import math

import numpy as np
import pytest

from trimtab.metrics import (
    DocumentScore,
    Estimate,
    bits_per_byte,
    bootstrap,
    paired_difference,
    pool_kinds,
)


def scores(count: int, seed: int, shift: float = 0.0) -> list[DocumentScore]:
    generator = np.random.default_rng(seed)
    sizes = generator.integers(200, 400, count)
    rates = generator.normal(0.8 + shift, 0.1, count)
    return [DocumentScore(float(r * s), int(s)) for r, s in zip(rates, sizes, strict=True)]


def test_bits_per_byte_by_hand() -> None:
    one_bit = DocumentScore(math.log(2) * 10, 10)
    assert bits_per_byte([one_bit]) == pytest.approx(1)
    three_bits = DocumentScore(math.log(2) * 90, 30)
    # 100 bits over 40 bytes: long documents weigh more than the mean of 1 and 3 has it.
    assert bits_per_byte([one_bit, three_bits]) == pytest.approx(2.5)


def test_bootstrap_errors_are_those_of_a_ratio() -> None:
    found = scores(200, seed=1)
    nats = np.array([s.nll_nats for s in found])
    sizes = np.array([s.scored_bytes for s in found])
    ratio = nats.sum() / sizes.sum()
    error = np.sqrt(((nats - ratio * sizes) ** 2).sum()) / sizes.sum() / math.log(2)
    estimate = bootstrap(found, resamples=4000)
    assert estimate.mean == pytest.approx(bits_per_byte(found))
    assert estimate.stderr == pytest.approx(error, rel=0.08)


def test_the_seed_decides() -> None:
    found = scores(20, seed=2)
    assert bootstrap(found, seed=3) == bootstrap(found, seed=3)
    assert bootstrap(found, seed=3).stderr != bootstrap(found, seed=4).stderr
    assert bootstrap(found[:1]).stderr == 0


def test_paired_differences_lose_what_documents_share() -> None:
    theirs = scores(100, seed=5)
    ours = [DocumentScore(0.9 * s.nll_nats, s.scored_bytes) for s in theirs]
    found = paired_difference(ours, theirs)
    assert found.mean == pytest.approx(-0.1 * bits_per_byte(theirs))
    assert found.stderr < 0.2 * bootstrap(theirs).stderr
    assert paired_difference(theirs, theirs) == Estimate(0.0, 0.0)
    with pytest.raises(ValueError, match="99 documents cannot be paired with 100"):
        paired_difference(ours[:99], theirs)


def test_kinds_weigh_the_same() -> None:
    found = pool_kinds([Estimate(1.0, 0.03), Estimate(3.0, 0.04)])
    assert found.mean == pytest.approx(2)
    assert found.stderr == pytest.approx(0.025)
