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
    ratios = resampled_bits(scores, draws(len(scores), seed, resamples))
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
    drawn = draws(len(ours), seed, resamples)
    mean = bits_per_byte(ours) - bits_per_byte(theirs)
    return Estimate(
        mean, float((resampled_bits(ours, drawn) - resampled_bits(theirs, drawn)).std())
    )


def pool_kinds(kinds: Sequence[Estimate]) -> Estimate:
    """Average several kinds of text with equal weight (equal bytes); errors add in squares."""
    mean = sum(kind.mean for kind in kinds) / len(kinds)
    return Estimate(mean, math.sqrt(sum(kind.stderr**2 for kind in kinds)) / len(kinds))


def draws(count: int, seed: int, resamples: int = 1000) -> np.ndarray:
    """Places of items that bootstrap samples are made of, shape [resamples, count]."""
    return np.random.default_rng(seed).integers(0, count, (resamples, count))


def resampled_bits(scores: Sequence[DocumentScore], drawn: np.ndarray) -> np.ndarray:
    """Bits per byte of each sample of the documents.

    Args:
        scores: One score a document.
        drawn: Places of documents, shape [resamples, documents].

    Returns:
        Shape [resamples].
    """
    nats = np.array([score.nll_nats for score in scores])
    size = np.array([score.scored_bytes for score in scores], dtype=float)
    return nats[drawn].sum(1) / (size[drawn].sum(1) * math.log(2))
