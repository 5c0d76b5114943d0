"""Speculative sampling: when a drafted token stands, and what replaces one that falls. Pure.

Leviathan, Kalman and Matias 2023, "Fast Inference from Transformers via Speculative Decoding", and
Chen et al. 2023, "Accelerating Large Language Model Decoding with Speculative Sampling".
"""

import torch
from torch import Tensor


def acceptance(probs: Tensor, token_id: int, proposal: Tensor | None) -> float:
    """Probability min(1, p / q) with which a drafted token is to be accepted.

    Accepted with this probability, and drawn from `residual` otherwise, a token has the
    distribution p, whatever q it was drafted from (Leviathan et al. 2023, appendix A.1). Where the
    draft was chosen in any other way that does not look at what decides its acceptance, it is a
    certain proposal, q = 1, and the same holds.

    Args:
        probs: p, what plain decoding would draw from, shape [vocab].
        token_id: The drafted token.
        proposal: q, what it was drawn from, shape [vocab]; None for a certain proposal.
    """
    drawn_with = 1.0 if proposal is None else float(proposal[token_id])
    if not drawn_with:
        raise ValueError(f"token {token_id} cannot have been drawn: its probability is 0")
    return min(1.0, float(probs[token_id]) / drawn_with)


def residual(probs: Tensor, token_id: int, proposal: Tensor | None) -> Tensor:
    """What the token in place of a rejected one is drawn from: max(0, p - q), normalised.

    Args:
        probs: p, shape [vocab], summing to one.
        token_id: The rejected token.
        proposal: q, shape [vocab], or None for a certain proposal.

    Returns:
        Probabilities, shape [vocab]; p itself where rounding alone parts p from q.
    """
    if proposal is None:
        left = probs.clone()
        left[token_id] = 0.0
    else:
        left = (probs - proposal).clamp_min(0.0)
    total = left.sum()
    return left / total if total > torch.finfo(left.dtype).tiny else probs
