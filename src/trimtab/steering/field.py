"""A host's next token as a few candidates and one tail: what all predictors are computed over."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trimtab.errors import NumericalError
from trimtab.unembedding import Unembeds

CANDIDATE_NATS = 14.0
"""Tokens this far below a row's likeliest are no candidates because of that row."""

CANDIDATES, ROW_CANDIDATES = 8192, 512
"""Likeliest tokens of all rows together, and of each at least, among which they are sought.

A token in the tail is steered with all others there. Where one row is asked alone, many more of
its own tokens must be candidates for the same text to cost the same as among other rows."""

CHUNK_ROWS = 64
"""Rows that are steered at once, which share their candidates."""

LOGIT_ROWS = 256
"""States whose logits are computed at once: a large vocabulary's matrix, which hardly fits through
a processor's memory, is then read a fourth as often. Of 262,144 tokens, 268 MB in float32."""

TAIL_ROWS = 8
"""Rows whose tails are read at once."""

IMPOSSIBLE_NATS = 1e4
"""Tokens of the tail that are so far below its likeliest have an exponential of zero."""

LEAST_LOGPROB = -60.0
"""Stands for the impossible: a finite number, which powers and differences leave a number."""


def logits_in_chunks(
    unembedding: Unembeds, hidden: Tensor, own: Tensor | None = None
) -> Iterator[tuple[range, Tensor]]:
    """Logits of a few states at a time.

    Args:
        unembedding: From states to logits.
        hidden: Shape [states, hidden], on any device.
        own: Their logits, where the model has computed them by itself, shape [states, vocab].

    Yields:
        Which states, at most CHUNK_ROWS, and their logits in float32, shape [few, vocab].
    """
    for start in range(0, len(hidden), LOGIT_ROWS):
        block = slice(start, start + LOGIT_ROWS)
        if own is None:
            computed = unembedding.logits(hidden[block].to(unembedding.device))
        else:
            computed = own[block]
        for place, logits in enumerate(computed.float().split(CHUNK_ROWS)):
            first = start + place * CHUNK_ROWS
            yield range(first, first + len(logits)), logits


@dataclass(frozen=True)
class Field:
    """A host's distributions over candidates and, in the last column, all other tokens together.

    Whatever steers decides between some hundred tokens; a vocabulary has a hundred thousand. The
    others are steered as a whole and keep the host's proportions among themselves.

    Attributes:
        logits: The host's own, shape [rows, vocab], where it has computed them.
        normaliser: Their log-sum-exp, shape [rows, 1].
        logprobs: The host's, at least `LEAST_LOGPROB`, shape [rows, candidates + 1].
        tail_entropy_nats: Of the host's distribution among the tokens of the tail, shape [rows].
        token_ids: The candidates, of all rows alike, ascending, shape [candidates].
    """

    logits: Tensor
    normaliser: Tensor
    logprobs: Tensor
    tail_entropy_nats: Tensor
    token_ids: Tensor

    @staticmethod
    def of(logits: Tensor, wanted: Tensor, *, strangers: bool = False) -> "Field":
        """Choose the candidates: the likely tokens of any row, and those that are wanted.

        Args:
            logits: In float32, shape [rows, vocab], on any device.
            wanted: Token ids, shape [wanted].
            strangers: The rows are of different texts, and lend each other no words: each has as
                many candidates of its own as if it were asked alone.
        """
        # Nothing is learnt through what steers, and what is read into buffers has no gradient.
        logits = logits.detach()
        each = CANDIDATES if strangers else max(CANDIDATES // len(logits), ROW_CANDIDATES)
        token_ids = torch.cat([_likely(logits, each), wanted.to(logits.device)]).unique()
        return Field(logits, *_over(logits, token_ids), token_ids.cpu())

    def tempered(self, temperature: float) -> Tensor:
        """The host's log-probabilities at another temperature, shape [rows, candidates + 1]."""
        return _over(self.logits / temperature, self.token_ids.to(self.logits.device))[1]

    def shifted(self, shift: Tensor) -> Tensor:
        """The host's log-probabilities with the candidates' logits shifted, [rows, candidates]."""
        tail = torch.zeros(len(self.logprobs), 1)
        return (self.logprobs + torch.cat([shift, tail], 1)).log_softmax(-1)

    def of_tokens(self, logprobs: Tensor, token_ids: Tensor) -> Tensor:
        """What predictors give to one token a row.

        Args:
            logprobs: Shape [..., rows, candidates + 1].
            token_ids: Shape [rows].

        Returns:
            Log-probabilities, shape [..., rows]; in the tail the host's proportions hold.
        """
        tail = len(self.token_ids)
        places = torch.searchsorted(self.token_ids, token_ids).clamp_max(tail - 1)
        inside = self.token_ids[places] != token_ids
        places = torch.where(inside, tail, places)
        own = self.logits.gather(1, token_ids[:, None].to(self.logits.device)) - self.normaliser
        share = torch.where(inside, own[:, 0].float().cpu() - self.logprobs[:, -1], 0.0)
        chosen = places.expand(logprobs.shape[:-1])[..., None]
        return logprobs.gather(-1, chosen)[..., 0] + share

    def everywhere(self, logprobs: Tensor) -> Tensor:
        """Spread distributions of shape [rows, candidates + 1] over the vocabulary.

        Returns:
            Shape [rows, vocab], where the host's logits are; tokens that these forbid (-inf)
            stay forbidden.
        """
        device = self.logits.device
        token_ids = self.token_ids.to(device)
        shift = (logprobs[:, -1:] - self.logprobs[:, -1:]).to(device)
        full = self.logits.float() + (shift - self.normaliser.float())
        is_forbidden = self.logits.index_select(1, token_ids).isneginf()
        chosen = logprobs[:, :-1].float().to(device)
        return full.index_copy_(1, token_ids, chosen.masked_fill(is_forbidden, -torch.inf))


def _likely(logits: Tensor, most: int) -> Tensor:
    """Tokens near the likeliest of some row, of the `most` likeliest there, shape [likely].

    What ties with the last of these is one of them.
    """
    least = logits.amax(-1) - CANDIDATE_NATS
    # numpy compares, and finds what is true, several times as fast as torch on a processor.
    rows = logits.numpy() if logits.device.type == "cpu" else logits
    bounds = least.tolist()
    near: Any = rows[0] > bounds[0]
    for row, bound in zip(rows[1:], bounds[1:], strict=True):
        near |= row > bound
    is_array = isinstance(near, np.ndarray)
    token_ids = torch.from_numpy(np.flatnonzero(near)) if is_array else near.nonzero()[:, 0]
    if len(token_ids) <= most:
        return token_ids
    chosen = logits.index_select(1, token_ids)
    is_near = chosen > least[:, None]
    # Most rows are sure enough to have fewer, and need no search for their last one.
    crowded = (is_near.sum(-1) > most).nonzero()[:, 0]
    if len(crowded):
        is_near[crowded] &= _are_among(chosen[crowded], most)
    return token_ids[is_near.any(0)]


def _are_among(logits: Tensor, most: int) -> Tensor:
    """Whether a row's tokens are among its `most` likeliest, ties with the last one included."""
    if logits.device.type == "cpu":
        last = torch.from_numpy(np.partition(logits.numpy(), -most, -1)[:, -most])
    else:
        last = logits.topk(most, -1).values[:, -1]
    return logits >= last[:, None]


def _over(logits: Tensor, token_ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Log-sum-exp of all tokens; log-probabilities of candidates and tail; the tail's entropy."""
    if not len(token_ids):
        raise NumericalError(
            "the host's logits are no numbers",
            hint="use --dtype float32, or another copy of the host",
        )
    chosen = logits.index_select(1, token_ids)
    tops, places = chosen.max(-1)
    # The tail is summed by itself: one less the candidates' share would be lost in rounding.
    totals, surprises = _beneath(logits, token_ids, tops, token_ids[places])
    tail = (tops + totals.log())[:, None]
    normaliser = torch.logaddexp(chosen.logsumexp(-1, keepdim=True), tail)
    logprobs = (torch.cat([chosen, tail], 1) - normaliser).clamp_min(LEAST_LOGPROB)
    # Where there are no tokens, there is nothing to be unsure of.
    entropies = (totals.log() - surprises / totals).nan_to_num(0.0, 0.0, 0.0)
    return normaliser, logprobs.float().cpu(), entropies.float().cpu()


def _beneath(
    logits: Tensor, token_ids: Tensor, tops: Tensor, likeliest: Tensor
) -> tuple[Tensor, Tensor]:
    """Read the tail, a few rows at a time: these stay in a processor's caches, and many do not.

    Args:
        logits: Shape [rows, vocab].
        token_ids: What is no part of it, shape [candidates].
        tops: The largest logit of each row, shape [rows].
        likeliest: The token that it is of, one of the candidates, shape [rows].

    Returns:
        Of each row the sum of exp(d), and of exp(d) d, over how far each token d lies below the
        row's likeliest.
    """
    totals, surprises = torch.empty_like(tops), torch.empty_like(tops)
    probs, below = torch.empty_like(logits[:TAIL_ROWS]), torch.empty_like(logits[0])
    for first in range(0, len(logits), TAIL_ROWS):
        some = range(first, min(first + TAIL_ROWS, len(logits)))
        # Softmax takes half the time of exp; the likeliest has a share of 1 in the sums.
        shares = torch.softmax(logits[first : some.stop], -1, out=probs[: len(some)])
        highest = shares.gather(1, likeliest[first : some.stop, None])[:, 0]
        shares.index_fill_(1, token_ids, 0.0)
        totals[first : some.stop] = shares.sum(-1) / highest
        for number, row in zip(some, shares, strict=True):
            torch.sub(logits[number], tops[number], out=below)
            # Tokens that cannot come at all have a share of nothing.
            torch.dot(row, below.clamp_min_(-IMPOSSIBLE_NATS), out=surprises[number])
        surprises[first : some.stop] /= highest
    return totals, surprises
