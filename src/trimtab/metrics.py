"""How good a model is at a text: bits per byte and the uncertainty of that figure. Pure."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Estimate:
    """A figure with its standard error.

    Attributes:
        mean: The figure.
        stderr: Standard deviation of its bootstrap distribution over documents.
    """

    mean: float
    stderr: float


@dataclass(frozen=True)
class DocumentScore:
    """What a model paid for one document.

    Attributes:
        nll_nats: Negative log-likelihood of all scored tokens, in nats.
        scored_bytes: Bytes of those tokens.
    """

    nll_nats: float
    scored_bytes: int


def bits_per_byte(scores: Sequence[DocumentScore]) -> float:
    """Pool documents: all nats over all bytes, in bits; at least 0.

    The only unit that survives a change of tokenizer. Long documents weigh more, as they do in a
    user's bill.
    """
    scored_bytes = sum(score.scored_bytes for score in scores)
    return sum(score.nll_nats for score in scores) / (scored_bytes * math.log(2))


def bootstrap(scores: Sequence[DocumentScore], *, seed: int = 0, resamples: int = 1000) -> Estimate:
    """Estimate bits per byte with a standard error, resampling whole documents.

    Tokens within a document are not independent; documents nearly are.

    Args:
        scores: One score a document, at least one.
        seed: Seed of the resampling.
        resamples: Number of bootstrap samples.
    """
    nll, size = _columns(scores)
    chosen = _resampled(len(scores), seed, resamples)
    ratios = nll[chosen].sum(1) / (size[chosen].sum(1) * math.log(2))
    return Estimate(bits_per_byte(scores), float(ratios.std()))


def paired_difference(
    ours: Sequence[DocumentScore],
    theirs: Sequence[DocumentScore],
    *,
    seed: int = 0,
    resamples: int = 1000,
) -> Estimate:
    """Estimate the difference ours - theirs in bits per byte over the same documents.

    Both sides are resampled together, so what documents have in common cancels.

    Raises:
        ValueError: If the two sides do not have equally many documents.
    """
    if len(ours) != len(theirs):
        raise ValueError(f"{len(ours)} documents cannot be paired with {len(theirs)}.")
    chosen = _resampled(len(ours), seed, resamples)
    sides = []
    for side in (ours, theirs):
        nll, size = _columns(side)
        sides.append(nll[chosen].sum(1) / (size[chosen].sum(1) * math.log(2)))
    mean = bits_per_byte(ours) - bits_per_byte(theirs)
    return Estimate(mean, float((sides[0] - sides[1]).std()))


def pool_kinds(kinds: Sequence[Estimate]) -> Estimate:
    """Average several kinds of text with equal weight (equal bytes); errors add in squares."""
    mean = sum(kind.mean for kind in kinds) / len(kinds)
    return Estimate(mean, math.sqrt(sum(kind.stderr**2 for kind in kinds)) / len(kinds))


def _columns(scores: Sequence[DocumentScore]) -> tuple[np.ndarray, np.ndarray]:
    return (
        np.array([score.nll_nats for score in scores]),
        np.array([score.scored_bytes for score in scores], dtype=float),
    )


def _resampled(count: int, seed: int, resamples: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, count, (resamples, count))
