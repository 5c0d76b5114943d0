"""Steering the rows of a batch in vLLM: whatever its runner, this is what happens to the logits."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trimtab.steering.predictors import Rows
from trimtab.vllm.requests import SteeredRequest


@dataclass(frozen=True)
class SteeredRow:
    """A row of a batch whose next token is about to be chosen.

    Attributes:
        place: Row of the logits.
        request: Whose row it is; its prompt has been read.
        context: The last bytes of its text.
    """

    place: int
    request: SteeredRequest
    context: bytes


def steer(logits: Tensor, hidden: Tensor, rows: Sequence[SteeredRow], is_text: Tensor) -> None:
    """Replace the logits of some rows by steered ones; the other rows are not touched.

    Steered log-probabilities are put at the level of the host's logits, so that penalties that
    depend on it, such as vLLM's for repetition, mean what they mean for the host.

    Args:
        logits: The host's own, shape [all rows, vocab]; changed in place.
        hidden: The states that gave them, shape [all rows, hidden].
        rows: The rows to steer.
        is_text: Which tokens stand for text, shape [vocab].
    """
    groups: dict[int, list[SteeredRow]] = {}
    for row in rows:
        groups.setdefault(id(row.request.several), []).append(row)
    for group in groups.values():
        places = torch.tensor([row.place for row in group], device=logits.device)
        own = logits[places].float()
        # Where a token that is no text is forced there is nothing to steer.
        free = ~(own.isneginf() | ~is_text).all(-1)
        if not free.any():
            continue
        kept = [row for row, is_free in zip(group, free.tolist(), strict=True) if is_free]
        places, own = places[free], own[free]
        several = kept[0].request.several
        contexts = tuple(row.context for row in kept)
        asked = Rows(own, hidden[places], contexts, strangers=True)
        trust = torch.stack(
            [row.request.weights for row in kept if row.request.weights is not None], 1
        )
        steered = several.logprobs([asked] * len(several.mixtures), trust)
        level = own.logsumexp(-1, keepdim=True)
        logits[places] = (steered + level).to(logits.dtype)
