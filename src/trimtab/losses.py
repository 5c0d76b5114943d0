"""Losses that training minimises, in nats. Pure."""

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Sums something over the counted targets: `loss(logits, targets, counted)`, a scalar."""

_IGNORED = -100
_LIKELIEST = 20


def masked_cross_entropy_nats(logits: Tensor, targets: Tensor, counted: Tensor) -> Tensor:
    """Sum the negative log-likelihoods of the counted targets, in nats; at least 0.

    A sum and not a mean, so that windows with different numbers of counted tokens can be added
    before they are divided. Computed in float32 whatever the logits' dtype, because bfloat16
    cannot tell probabilities near 1 apart.

    Args:
        logits: Shape [batch, seq, vocab].
        targets: Token ids, shape [batch, seq].
        counted: Which targets count, boolean, shape [batch, seq].

    Returns:
        A scalar in float32; 0 if nothing is counted.
    """
    return _cross_entropy_nats(logits.flatten(0, 1), targets, counted, reduction="sum")


def entropy_adaptive_nats(
    logits: Tensor, targets: Tensor, counted: Tensor, *, alpha: float = 1.0
) -> Tensor:
    """Sum the counted targets' cross entropies, each weighted by how unsure the model is; nats.

        loss = sum_t weight_t * -ln p(target_t),   weight_t = normalised_entropy_t ^ alpha

    The weight is a constant to the gradient: a model must not lower its loss by growing sure. A
    target that a sure model finds improbable, which pulls hardest in the cross entropy, pulls
    little here.

    The sum is meant to be divided by the number of counted tokens, not by the sum of the weights:
    so does the authors' code. Divided by the weights, a batch of which the model is sure would
    again pull as hard as any other, and windows could not be added before all weights are known.

    Entropy-Adaptive Fine-Tuning (EAFT), arXiv 2601.02151.

    Args:
        logits: Shape [batch, seq, vocab], vocab at least 2.
        targets: Token ids, shape [batch, seq].
        counted: Which targets count, boolean, shape [batch, seq].
        alpha: At least 0; with 0 this is the cross entropy, and its gradient bit for bit.

    Returns:
        A scalar in float32, between 0 and the cross entropy; 0 if nothing is counted.
    """
    flat = logits.flatten(0, 1)
    weights = normalised_entropy(flat) ** alpha
    return (weights * _cross_entropy_nats(flat, targets, counted, reduction="none")).sum()


@torch.no_grad()
def normalised_entropy(logits: Tensor) -> Tensor:
    """How unsure a model is: entropy of its 20 likeliest tokens as a share of the largest.

        -sum_i p_i ln p_i / ln k   over the k = min(20, vocab) likeliest, their p_i summing to 1

    Without the division the value would reach ln 20 = 3.0, and as a weight of the loss multiply
    gradients by up to that much. Of the vocabulary only the k logits are copied; they are widened
    to float32 after the choice, which bfloat16 makes as well.

    Args:
        logits: Shape [..., vocab], vocab at least 2; -inf where a token is impossible.

    Returns:
        Shape [...], float32, in [0, 1]; without gradient.
    """
    likeliest = min(_LIKELIEST, logits.shape[-1])
    values = logits.topk(likeliest).values.float()
    # With r_i = p_i / p_1 and R their sum without the first, the entropy is
    # ln(1 + R) - sum_i r_i ln r_i / (1 + R): no 1 - p_1, which float32 loses when p_1 is near 1.
    ratios = (values[..., 1:] - values[..., :1]).exp()
    rest = ratios.sum(-1)
    entropy_nats = rest.log1p() + torch.special.entr(ratios).sum(-1) / (1 + rest)
    # Rounding lifts an even distribution just above 1.
    return (entropy_nats / math.log(likeliest)).clamp(max=1)


def kl_nats(target_logits: Tensor, logits: Tensor) -> Tensor:
    """Kullback-Leibler divergence KL(target || ours) in nats, at least 0.

    Both sides are normalised here over the tokens given, so that a subset of the vocabulary is
    compared as the distribution given that subset.

    Args:
        target_logits: Shape [..., vocab].
        logits: Shape [..., vocab].

    Returns:
        Shape [...].
    """
    target_logprobs = target_logits.log_softmax(-1)
    difference = target_logprobs - logits.log_softmax(-1)
    return (target_logprobs.exp() * difference).sum(-1)


def _cross_entropy_nats(
    flat: Tensor, targets: Tensor, counted: Tensor, *, reduction: str
) -> Tensor:
    chosen = targets.masked_fill(~counted, _IGNORED).flatten()
    return functional.cross_entropy(
        flat.float(), chosen, ignore_index=_IGNORED, reduction=reduction
    )
