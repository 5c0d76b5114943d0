"""Choosing one token from a distribution, by one request's own settings. Pure."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

_COLDEST = 1e-30
"""Any gap between two float32 scores, divided by this, leaves nothing for the smaller one."""


@dataclass(frozen=True)
class Choosing:
    """How a request wants its tokens to be chosen.

    Attributes:
        temperature: 0 takes the likeliest token; a tiny one does the same, with ties drawn.
        top_p: Smallest set of tokens with this much probability, in (0, 1].
        top_k: That many likeliest tokens; 0 is all.
        logit_bias: Added to the log-probabilities, in nats, by token id.
        presence_penalty: Subtracted, in nats, from every token that the answer has.
        frequency_penalty: Subtracted, in nats, for each time that the answer has it.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0


def choose(
    logprobs: Tensor, by: Choosing, counts: Mapping[int, int], generator: torch.Generator
) -> int:
    """Choose the next token.

    Biases and penalties come first, then temperature, then top_k and top_p, as everywhere.

    Args:
        logprobs: Natural-log probabilities, shape [vocab].
        by: The request's settings.
        counts: How often the answer has each token so far.
        generator: Of this answer alone, so that a seed gives the same answer in any company.
    """
    scores = _shifted(logprobs.float(), by, counts)
    if by.temperature == 0:
        # numpy reads a vocabulary many times as fast as torch does on a processor.
        return int(np.argmax(scores.cpu().numpy()))
    # From the likeliest on, and no colder than float32 can tell: a quotient that is no number, or
    # has -inf for every token, would be no distribution.
    below_best = scores - scores.max()
    kept = keep_likely((below_best / max(by.temperature, _COLDEST)).cpu(), by.top_k, by.top_p)
    return int(torch.multinomial(kept.softmax(-1), 1, generator=generator))


def _shifted(logprobs: Tensor, by: Choosing, counts: Mapping[int, int]) -> Tensor:
    shifts = dict(by.logit_bias)
    if by.presence_penalty or by.frequency_penalty:
        for token_id, count in counts.items():
            penalty = by.presence_penalty + by.frequency_penalty * count
            shifts[token_id] = shifts.get(token_id, 0.0) - penalty
    if not shifts:
        return logprobs
    shifted = logprobs.clone()
    places = torch.tensor(list(shifts), device=logprobs.device)
    shifted[places] += torch.tensor(list(shifts.values()), device=logprobs.device)
    return shifted


def keep_likely(scores: Tensor, top_k: int, top_p: float) -> Tensor:
    """Set all scores but those of the likeliest tokens to -inf.

    Args:
        scores: Log-probabilities up to a constant, shape [vocab].
        top_k: As in `Choosing`.
        top_p: As in `Choosing`; at least one token is kept.
    """
    if top_k and top_k < len(scores):
        scores = scores.masked_fill(scores < scores.topk(top_k).values[-1], -torch.inf)
    if top_p < 1:
        ordered = scores.sort(descending=True)
        probs = ordered.values.softmax(-1)
        # A token is kept if those before it have not reached top_p.
        dropped = ordered.indices[probs.cumsum(-1) - probs >= top_p]
        scores = scores.index_fill(0, dropped[dropped != ordered.indices[0]], -torch.inf)
    return scores
