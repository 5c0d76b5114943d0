"""A host that shows its likeliest tokens only: their distribution made whole, and steered."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trimtab.backends.live import Live
from trimtab.backends.reading import LiveReading, PairProbs
from trimtab.steering.field import LEAST_LOGPROB
from trimtab.steering.predictors import Steering, live_blends, of_text

EXPECTED = 256
"""Likeliest tokens of the expert that are candidates though the host has not shown them."""


DEALS = 16
"""Rounds of dealing out at most; what is too much for a token after them is the tail's."""


MOST_BLAME_NATS = 1.0
"""By so much a blend may fall behind the host on a token that was not shown, as evidence."""


@dataclass(frozen=True)
class Shown:
    """What a host has shown of the tokens after some contexts.

    Attributes:
        token_ids: Candidates of all contexts, ascending, shape [candidates].
        logprobs: The host's, shape [contexts, candidates]; NaN where it has shown none.
        prior: How likely candidates are beforehand, shape [candidates].
        told_apart: As for `Live.score`.
    """

    token_ids: Tensor
    logprobs: Tensor
    prior: Tensor
    told_apart: Sequence[int] = ()

    @staticmethod
    def of(
        rows: Sequence[Mapping[int, float]],
        wanted: Tensor,
        prior: Tensor | None = None,
        told_apart: Sequence[int] = (),
    ) -> "Shown":
        """Gather what was shown by token id, one mapping a context, and candidates beside it.

        Args:
            rows: Natural-log probabilities by token id.
            wanted: Other candidates.
            prior: How likely tokens are beforehand, shape [vocab] (default: every candidate as
                likely as another, or all other tokens together).
            told_apart: As for `Live.score`.
        """
        shown = torch.tensor(sorted({i for row in rows for i in row}), dtype=torch.long)
        token_ids = torch.cat([shown, wanted]).unique()
        logprobs = torch.full((len(rows), len(token_ids)), torch.nan)
        for number, row in enumerate(rows):
            ids = torch.tensor(list(row), dtype=torch.long)
            places = torch.searchsorted(token_ids, ids)
            logprobs[number, places] = torch.tensor(list(row.values()), dtype=torch.float32)
        alike = torch.full((len(token_ids),), 1.0 / (len(token_ids) + 1))
        return Shown(token_ids, logprobs, alike if prior is None else prior[token_ids], told_apart)


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
    least = torch.where(shown, probs, torch.inf).amin(-1, keepdim=True)
    weights = torch.where(shown, 0.0, stand_in.double())
    tail = (1.0 - stand_in.double().sum(-1, keepdim=True)).clamp_min(1e-12)
    probs = torch.where(shown, probs, _dealt(left, weights, tail, least))
    tail = (1.0 - probs.sum(-1, keepdim=True)).clamp_min(0.0)
    return torch.cat([probs, tail], -1).log().clamp_min(LEAST_LOGPROB).float()


def fair_evidence(scores: Tensor, host_logprobs: Tensor, was_shown: Tensor) -> Tensor:
    """What predictors have to show for themselves, where some tokens were not shown.

    A blend knows of such a token only what a stand-in makes up for the host. What it loses to the
    whole host there is mostly the stand-in's fault, and a few such tokens would end all trust in
    it; what it wins is its own merit.

    Args:
        scores: Natural-log probabilities of the tokens that came, shape [predictors, tokens], the
            host first.
        host_logprobs: The whole host's, shape [tokens].
        was_shown: Whether each was among the tokens shown, shape [tokens].

    Returns:
        Shape [predictors, tokens]; the host's are its own.
    """
    # An API may write an impossible token's as some thousand below 0.
    host_logprobs = host_logprobs.clamp_min(LEAST_LOGPROB)
    blends = scores[1:].maximum(host_logprobs - MOST_BLAME_NATS)
    blends = torch.where(was_shown, scores[1:], blends)
    return torch.cat([host_logprobs[None].to(blends), blends])


def _dealt(left: Tensor, weights: Tensor, tail: Tensor, most: Tensor) -> Tensor:
    """Deal out what is left in proportion to weights, but to nothing more than the most.

    What goes beyond that is dealt out again among those that have less.

    Args:
        left: Shape [contexts, 1].
        weights: 0 for what gets nothing, shape [contexts, candidates].
        tail: Weight of all other tokens, which may get any amount, shape [contexts, 1].
        most: Shape [contexts, 1].

    Returns:
        Shape [contexts, candidates].
    """
    is_full, dealt = torch.zeros_like(weights, dtype=torch.bool), torch.zeros_like(weights)
    for _ in range(DEALS):
        rest = (left - most.nan_to_num(posinf=0.0) * is_full.sum(-1, keepdim=True)).clamp_min(0.0)
        total = weights.masked_fill(is_full, 0.0).sum(-1, keepdim=True) + tail
        dealt = torch.where(is_full, most, rest * weights / total)
        beyond = ~is_full & (dealt > most)
        if not beyond.any():
            break
        is_full |= beyond
    return dealt.minimum(most)


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
    first = made_whole(shown.logprobs, shown.prior.expand_as(shown.logprobs))
    host_probs = of_text(first, known)[:, :-1].exp()
    pair = live.score(reading, questions, host_probs, shown.token_ids[known], shown.told_apart)
    pair = PairProbs(pair.expert.float(), pair.reference.float())
    special = shown.logprobs[:, ~known].exp().nan_to_num(0.0)
    stand_in = torch.zeros_like(shown.logprobs)
    stand_in[:, known] = pair.reference * (1.0 - special.sum(-1, keepdim=True).clamp_max(1.0))
    stand_in[:, ~known] = special
    host = made_whole(shown.logprobs, stand_in)
    return {"host": host} | live_blends(steering, host, known, pair)
