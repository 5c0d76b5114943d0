"""Losses that training minimises, in nats. Pure."""

from torch import Tensor
from torch.nn import functional

_IGNORED = -100


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
    chosen = targets.masked_fill(~counted, _IGNORED)
    return functional.cross_entropy(
        logits.flatten(0, 1).float(), chosen.flatten(), ignore_index=_IGNORED, reduction="sum"
    )


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
