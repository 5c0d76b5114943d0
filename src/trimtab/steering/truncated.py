"""A host that shows its likeliest tokens only: their distribution made whole, and steered."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from trimtab.backends.live import Live, PairProbs
from trimtab.backends.reading import LiveReading
from trimtab.steering.field import LEAST_LOGPROB
from trimtab.steering.predictors import Steering, live_blends, of_text

EXPECTED = 256
"""Likeliest tokens of the expert that are candidates though the host has not shown them."""


@dataclass(frozen=True)
class Shown:
    """What a host has shown of the tokens after some contexts.

    Attributes:
        token_ids: Candidates of all contexts, ascending, shape [candidates].
        logprobs: The host's, shape [contexts, candidates]; NaN where it has shown none.
    """

    token_ids: Tensor
    logprobs: Tensor

    @staticmethod
    def of(rows: list[Mapping[int, float]], wanted: Tensor) -> "Shown":
        """Gather what was shown by token id, one mapping a context, and candidates beside it."""
        shown = torch.tensor(sorted({i for row in rows for i in row}), dtype=torch.long)
        token_ids = torch.cat([shown, wanted]).unique()
        logprobs = torch.full((len(rows), len(token_ids)), torch.nan)
        for number, row in enumerate(rows):
            ids = torch.tensor(list(row), dtype=torch.long)
            places = torch.searchsorted(token_ids, ids)
            logprobs[number, places] = torch.tensor(list(row.values()), dtype=torch.float32)
        return Shown(token_ids, logprobs)


def made_whole(logprobs: Tensor, stand_in: Tensor) -> Tensor:
    """Deal out what a truncated distribution leaves over, among candidates and one tail.

    The tokens that were shown keep their probability. The others share the rest m as another
    model sees them: m q(t) / (1 - q(shown)), but never more than the least likely token shown,
    which is all that the host says about them. What this leaves is the tail's.

    With the reference for q, tokens on which expert and reference agree keep this share in a
    blend whose exponents a + b - c sum to one, so that general text is not steered by having been
    cut off; and where they differ, the blend follows the expert's tail.

    Args:
        logprobs: Natural-log probabilities of candidates, shape [contexts, candidates]; NaN where
            none was shown. A host may round them, so that they sum to a little more than one.
        stand_in: q, shape [contexts, candidates], each row summing to at most one.

    Returns:
        Natural-log probabilities that sum to one, at least `LEAST_LOGPROB`, shape
        [contexts, candidates + 1], the tail last.
    """
    shown = ~logprobs.isnan()
    probs = torch.where(shown, logprobs.exp(), 0.0).double()
    probs = probs / probs.sum(-1, keepdim=True).clamp_min(1.0)
    left = (1.0 - probs.sum(-1, keepdim=True)).clamp_min(0.0)
    others = (1.0 - torch.where(shown, stand_in.double(), 0.0).sum(-1, keepdim=True)).clamp_min(0)
    dealt = left * stand_in.double() / others.clamp_min(1e-12)
    least = torch.where(shown, probs, torch.inf).amin(-1, keepdim=True)
    probs = torch.where(shown, probs, dealt.minimum(least))
    tail = (1.0 - probs.sum(-1, keepdim=True)).clamp_min(0.0)
    return torch.cat([probs, tail], -1).log().clamp_min(LEAST_LOGPROB).float()


def truncated(
    steering: Steering, live: Live, reading: LiveReading, questions: range, shown: Shown
) -> dict[str, Tensor]:
    """What each predictor says where a host has shown some tokens only.

    The expert and its reference are asked twice on paper and once in fact: what the reference
    expects of the tokens that were not shown makes the host's distribution whole, over which both
    are then blended.

    Args:
        steering: The blends.
        live: The models beside the host's tokens.
        reading: How they have read the contexts.
        questions: Which contexts of the reading, one for each row of `shown`.
        shown: What the host has shown.

    Returns:
        By predictor, `host` first, natural-log probabilities of candidates and the tail, shape
        [contexts, candidates + 1].
    """
    known = live.alignment.is_known[shown.token_ids]
    first = made_whole(shown.logprobs, _alike(shown.logprobs))
    host_probs = of_text(first, known)[:, :-1].exp()
    pair = live.score(reading, questions, host_probs, shown.token_ids[known])
    pair = PairProbs(pair.expert.float(), pair.reference.float())
    special = shown.logprobs[:, ~known].exp().nan_to_num(0.0)
    stand_in = torch.zeros_like(shown.logprobs)
    stand_in[:, known] = pair.reference * (1.0 - special.sum(-1, keepdim=True).clamp_max(1.0))
    stand_in[:, ~known] = special
    host = made_whole(shown.logprobs, stand_in)
    return {"host": host} | live_blends(steering, host, known, pair)


def _alike(logprobs: Tensor) -> Tensor:
    """A stand-in that knows nothing: every candidate is as likely as another, or the tail."""
    return torch.full_like(logprobs, 1.0 / (logprobs.shape[1] + 1))
