"""How far an export's logits are from the mounted head's, in nats. Pure."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Logits = Callable[[Tensor], Tensor]
"""From a host's states [positions, hidden] to logits [positions, vocab] in float32."""

CHUNK_POSITIONS = 16
"""Positions compared at once: 16 rows of 262,144 tokens are 17 MB in float32."""


@dataclass(frozen=True)
class Fidelity:
    """Two sets of logits over the same positions, compared after the softmax.

    A softmax ignores a number that is added to all logits of a position, and so do all of these.

    Attributes:
        positions: Positions compared.
        mean_kl_nats: Mean of KL(first || second) over positions.
        max_kl_nats: The largest.
        max_logprob_nats: Largest difference of any token's log-probability anywhere.
        same_top_share: Share of positions at which both prefer the same token, in [0, 1].
    """

    positions: int
    mean_kl_nats: float
    max_kl_nats: float
    max_logprob_nats: float
    same_top_share: float


def compare(ours: Logits, theirs: Logits, hidden: Tensor) -> Fidelity:
    """Compare two ways to get from states to logits.

    Args:
        ours: The first.
        theirs: The second.
        hidden: States, at least one, shape [positions, hidden].
    """
    kls, worst, same = [], [], []
    for part in hidden.split(CHUNK_POSITIONS):
        one, two = (logits(part).float().log_softmax(-1) for logits in (ours, theirs))
        # In float64: the small differences of a good export would drown in rounding otherwise.
        kls.append((one.double().exp() * (one.double() - two.double())).sum(-1).clamp_min(0))
        worst.append((one - two).abs().amax(-1))
        same.append((one.argmax(-1) == two.argmax(-1)).double())
    kl = torch.cat(kls)
    return Fidelity(
        len(kl),
        float(kl.mean()),
        float(kl.max()),
        float(torch.cat(worst).max()),
        float(torch.cat(same).mean()),
    )
