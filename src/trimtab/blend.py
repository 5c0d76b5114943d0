"""Combining distributions over one vocabulary at decoding time. Pure functions."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class BlendWeights:
    """Exponents of a log-linear blend: p = p_host^host * p_expert^expert / p_reference^reference.

    Attributes:
        host: a in DESIGN's formula; (1, alpha, alpha) is proxy tuning (Liu et al. 2024).
        expert: b.
        reference: c.
    """

    host: float
    expert: float
    reference: float


PROXY = BlendWeights(1.0, 1.0, 1.0)


def log_linear(
    host_logprobs: Tensor, expert_logprobs: Tensor, reference_logprobs: Tensor, by: BlendWeights
) -> Tensor:
    """Blend three distributions in log space and normalise.

    A product lets each model veto: what one finds impossible stays improbable, which a mixture
    would allow. With a + b - c = 1 the blend of three equal distributions is that distribution.

    Args:
        host_logprobs: Natural-log probabilities, shape [..., vocab].
        expert_logprobs: Likewise, same shape.
        reference_logprobs: Likewise, same shape.
        by: Exponents.

    Returns:
        Natural-log probabilities, shape [..., vocab]; they sum to one.
    """
    # 0 * -inf is no number: a model without a say may well forbid tokens.
    blended = by.host * host_logprobs if by.host else torch.zeros_like(host_logprobs)
    if by.expert:
        blended = blended + by.expert * expert_logprobs
    if by.reference:
        blended = blended - by.reference * reference_logprobs
    return blended.log_softmax(-1)


def mix(logprobs: Tensor, other_logprobs: Tensor, gate: Tensor) -> Tensor:
    """Mix two distributions: log((1 - gate) p + gate q), without leaving log space.

    Args:
        logprobs: log p, any shape.
        other_logprobs: log q, same shape; -inf where q has no mass.
        gate: Weight of q in [0, 1), broadcastable.

    Returns:
        Natural-log probabilities of the mixture.
    """
    return torch.logaddexp(logprobs + torch.log1p(-gate), other_logprobs + gate.log())


def evidence_weights(
    logprobs: Tensor, prior: Tensor, *, share: float = 0.0, start: Tensor | None = None
) -> Tensor:
    """Weigh several predictors by how well each has predicted the text so far.

    This is the Bayesian mixture of predictors (with share > 0 the fixed-share forecaster of
    Herbster and Warmuth 1998, which lets the best predictor change along the text). Its mixture
    pays at most -ln(prior[k]) nats more than predictor k over a whole text when share is 0: with
    the bare host among the predictors, steering costs at most that much on any text whatever.

    Args:
        logprobs: Log-probability that each predictor gave to each token seen, in nats,
            shape [predictors, seq].
        prior: Weights before any token, positive, summing to one, shape [predictors].
        share: Part of each weight that is dealt out again by the prior after every token, in
            [0, 1).
        start: Weights to begin with, where the text goes on from a part that was weighed before:
            that part's last column; None is the prior.

    Returns:
        Weights to predict token t with, from the tokens before t only: shape
        [predictors, seq + 1]; each column sums to one.
    """
    log_prior = prior.double().log()
    columns = [log_prior if start is None else start.double().log()]
    for step in logprobs.double().T:
        posterior = (columns[-1] + step).log_softmax(0)
        if share:
            posterior = torch.logaddexp(posterior + math.log1p(-share), log_prior + math.log(share))
        columns.append(posterior)
    return torch.stack(columns, 1).exp()


def mixture_logprobs(logprobs: Tensor, weights: Tensor) -> Tensor:
    """Log-probability of a weighted mixture of predictors.

    Args:
        logprobs: Shape [predictors, ...].
        weights: Shape [predictors, ...], summing to one over predictors.

    Returns:
        Natural-log probabilities, shape [...].
    """
    return torch.logsumexp(logprobs + weights.log().to(logprobs.dtype), 0)
