r"""An expert's states in few bytes, where the reference's states are known.

What is stored is by how much the expert's state differs from what the reference's foretells of it
(`trimtab.foretelling`), as whole numbers n in coordinates of its own, d = B z. A small error e of z
costs KL(expert, stored) about e' M e / 2 nats, where M is the covariance of the logits' coordinates
J = W B over the next token. M is another one at each position, and what tells it well enough is
known to the reader too: the distribution after the foretold state, and the ids of the few tokens
that the expert expects and it does not. So each position has steps of its own, wide where no
likely token depends on a coordinate.

With the Cholesky factor R'R = M / step^2 + I, where I stands for a z of variance 1, the coordinates
are rounded one after the other to multiples of SPACING / R_ii, and what each has been rounded by is
made up for by those that follow (Babai's nearest plane, as in GPTQ, arXiv 2210.17323). The sum of
log R_ii is the rate at which a Gaussian z can be told to this precision. The numbers are Rice codes
that need none of this to be read, so that rounding on another machine changes a state by as
little as the factor, and never what the bits mean.

A few positions, where the expert is far from what was foretold, would lose most of all that is
lost. The writer knows what each loses: where that is too much, the step is halved for this
position, and again, and how often is stored.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from trimtab.foretelling import Foretelling, foretelling_for
from trimtab.losses import kl_nats
from trimtab.stored_states import MOST_HALVINGS, MOST_UNEXPECTED, StoredStates, Unexpected
from trimtab.unembedding import Unembedding

MOST_ROWS = 32
MATRIX_NUMBERS = 2**23
"""Positions at once, and numbers of one of their matrices, of which there are some."""

TOKEN_BLOCK = 8_192
"""Tokens whose part of a product over the vocabulary is computed at once."""

SPACING = 2.0
FEWEST_R = 1.15
"""Coordinates with a smaller R_ii are told to be zero: their own variance is all that is known."""

LARGEST_NUMBER = 2**14 - 1
"""Numbers are cut to this size, far above any that was seen."""

LEAST_PROB, LEAST_RATIO = 0.003, 4.0
"""A token is unexpected where the expert gives it so much, and so many times its weight."""

SAMPLE_ROWS = 2_048
"""Positions that a code is made of, about."""

LIKELY_TOKENS, FLATTENING = 512, 0.7
STEP_SHARES = (0.04, 0.034, 0.028, 0.024, 0.02, 0.017, 0.014, 0.012, 0.01, 0.008, 0.006)
"""Steps to choose from, over the root of KL(expert, reference)."""

MOST_LOST = 0.008
"""KL(expert, stored) over KL(expert, reference) that a step may cost, on states of which the
coordinates were not made."""

MOST_LOST_ROW = 5.0
"""What one position may cost over what all may in the mean."""

TRIED_ROWS = 128

_FISHER_ROWS = 256
_LEAST_NATS = 1e-5
_SHRINKAGE = 0.2


@dataclass(frozen=True)
class Precision:
    """What writer and reader of states agree on.

    Attributes:
        step: Precision of a coordinate in the root of nats; smaller is better and larger.
        likely_tokens: The foretold state's likeliest tokens, which tell how a logit matters.
        flattening: Power of their probabilities, below 1 since the expert may think otherwise.
        row_nats: KL(expert, stored) of one position from which on its step is halved.
    """

    step: float
    likely_tokens: int
    flattening: float
    row_nats: float


@dataclass(frozen=True)
class StateCode:
    """From states to what is stored, and back.

    Attributes:
        basis: B, shape [hidden, hidden].
        foretelling: From the reference's states to the states from which differences are told.
        head: Of reference and expert alike.
        precision: Steps and what they depend on.
    """

    basis: Tensor
    foretelling: Foretelling
    head: Unembedding
    precision: Precision

    def encode(
        self, reference: Tensor, expert: Tensor, advance: Callable[[int], None] | None = None
    ) -> StoredStates:
        """Encode the expert's states.

        Args:
            reference: As they are stored, at least one, shape [rows, hidden].
            expert: Of the same shape.
            advance: Told of rows as they are done.
        """
        rows, hidden = reference.shape
        stored = StoredStates.empty(rows, hidden)
        inverse = torch.linalg.inv(self.basis.double()).float().T
        tables = self._token_rows(), inverse
        todo = torch.arange(rows)
        for count in range(MOST_HALVINGS + 1):
            lost = [torch.zeros(0, dtype=torch.float64)]
            for some in todo.split(_rows_at_once(hidden)):
                stored.halvings[some] = count
                lost.append(self._encode(some, stored, reference, expert, tables))
                if advance is not None and count == 0:
                    advance(len(some))
            # Few are left, and all that are go on together: each pass reads the whole head.
            todo = todo[torch.cat(lost) > self.precision.row_nats]
            if not len(todo):
                break
        return stored

    def _encode(
        self,
        some: Tensor,
        stored: StoredStates,
        reference: Tensor,
        expert: Tensor,
        tables: tuple[Tensor, Tensor],
    ) -> Tensor:
        """Encode some rows, with steps halved as is stored; KL(expert, stored), shape [some]."""
        token_rows, inverse = tables
        foretold, theirs = self.foretelling.states(reference[some].float()), expert[some].float()
        weights, wanted = self._weights(self._probs(foretold)), self._logits(theirs)
        unexpected = _unexpected(wanted.softmax(-1), weights)
        stored.unexpected.token_ids[some] = unexpected.token_ids
        stored.unexpected.levels[some] = unexpected.levels
        factor = self._factor(_with(weights, unexpected), stored.halvings[some], token_rows)
        numbers = _rounded((theirs - foretold) @ inverse, factor)
        stored.numbers[some] = numbers
        spacing = SPACING / factor.diagonal(dim1=1, dim2=2)
        found = foretold + (numbers.float() * spacing) @ self.basis.T
        return kl_nats(wanted.double(), self._logits(found).double())

    def decode(
        self,
        reference: Tensor,
        stored: StoredStates,
        advance: Callable[[int], None] | None = None,
    ) -> Tensor:
        """Decode the expert's states; float32, shape [rows, hidden].

        Args:
            reference: As they are stored, shape [rows, hidden].
            stored: What `encode` gave of them.
            advance: Told of rows as they are done.
        """
        token_rows = self._token_rows()
        states = [torch.zeros(0, reference.shape[1])]
        size = _rows_at_once(reference.shape[1])
        for start in range(0, len(reference), size):
            rows = slice(start, start + size)
            ours, some = self.foretelling.states(reference[rows].float()), stored.rows(rows)
            weights = _with(self._weights(self._probs(ours)), some.unexpected)
            factor = self._factor(weights, some.halvings, token_rows)
            spacing = SPACING / factor.diagonal(dim1=1, dim2=2)
            states.append(ours + (some.numbers.float() * spacing) @ self.basis.T)
            if advance is not None:
                advance(len(ours))
        return torch.cat(states)

    def _token_rows(self) -> Tensor:
        """W B: how each token's logit depends on the coordinates, shape [vocab, hidden]."""
        with torch.no_grad():
            blocks = self.head.weight.split(TOKEN_BLOCK)
            return torch.cat(
                [self.head.scale * block.float().cpu() @ self.basis for block in blocks]
            )

    def _logits(self, states: Tensor) -> Tensor:
        with torch.no_grad():
            return self.head.logits(states).float().cpu()

    def _probs(self, states: Tensor) -> Tensor:
        return self._logits(states).softmax(-1)

    def _weights(self, probs: Tensor) -> Tensor:
        """How much each token's logit matters, as far as the foretold state tells, [rows, vocab].

        They go to zero towards the least of the likely tokens, so that it does not matter which of
        two is the last one of them.
        """
        count = min(self.precision.likely_tokens, probs.shape[1] - 1)
        top, ids = probs.topk(count + 1, -1)
        above = (top[:, :-1] - top[:, -1:]) ** self.precision.flattening
        above = above / above.sum(-1, keepdim=True).clamp(min=torch.finfo(above.dtype).tiny)
        return torch.zeros_like(probs).scatter(1, ids[:, :-1], above)

    def _factor(self, weights: Tensor, halvings: Tensor, token_rows: Tensor) -> Tensor:
        """R, shape [rows, hidden, hidden]."""
        count = int((weights > 0).sum(-1).max())
        top, ids = (weights / weights.sum(-1, keepdim=True)).topk(count, -1)
        rows = token_rows[ids]
        centred = (rows - (top[:, :, None] * rows).sum(1, keepdim=True)) * top.sqrt()[:, :, None]
        steps = self.precision.step * 0.5 ** halvings.float()
        metric = centred.transpose(1, 2) @ centred / steps[:, None, None] ** 2
        metric.diagonal(dim1=1, dim2=2).add_(1.0)
        return torch.linalg.cholesky(metric, upper=True)


def _rows_at_once(hidden: int) -> int:
    return max(1, min(MOST_ROWS, MATRIX_NUMBERS // hidden**2))


def code_for(reference: Tensor, expert: Tensor, head: Unembedding) -> StateCode:
    """A code for states like these: its coordinates, and the widest step that loses little.

    Args:
        reference: Some states, at least one, shape [rows, hidden].
        expert: Of the same shape.
        head: Of both.
    """
    reference, expert = reference.cpu().float(), expert.cpu().float()
    every = max(2, len(reference) // TRIED_ROWS)
    is_tried = torch.arange(len(reference)) % every == 0
    is_known = is_tried if is_tried.all() else ~is_tried
    known = reference[is_known]
    foretelling, left = foretelling_for(known, expert[is_known] - known)
    basis = difference_basis(foretelling.states(known), left, head)
    ours, theirs = reference[is_tried], expert[is_tried]
    # Two models that say the same need no finer steps than float16 has.
    between = max(_nats(head, theirs, ours), _LEAST_NATS)
    row_nats = MOST_LOST_ROW * MOST_LOST * between
    precision = Precision(between**0.5, LIKELY_TOKENS, FLATTENING, row_nats)
    code = StateCode(basis, foretelling, head, precision)
    for share in STEP_SHARES:
        code = replace(code, precision=replace(code.precision, step=share * between**0.5))
        lost = _nats(head, theirs, code.decode(ours, code.encode(ours, theirs)))
        if lost <= MOST_LOST * between:
            break
    return code


def _nats(head: Unembedding, one: Tensor, other: Tensor) -> float:
    """KL(one, other), mean over some states."""
    return float(_row_nats(head, one, other).sum()) / max(1, len(one))


def _row_nats(head: Unembedding, one: Tensor, other: Tensor) -> Tensor:
    """KL(one, other) of each of some states, shape [rows]."""
    found = [torch.zeros(0, dtype=torch.float64)]
    with torch.no_grad():
        for pair in zip(one.split(MOST_ROWS), other.split(MOST_ROWS), strict=True):
            ours, theirs = (head.logits(states).double().cpu() for states in pair)
            found.append(kl_nats(ours, theirs))
    return torch.cat(found)


def _some(states: Tensor) -> Tensor:
    """Rows from all over, for what takes the whole vocabulary."""
    return states[:: max(1, len(states) // _FISHER_ROWS)]


def difference_basis(states: Tensor, difference: Tensor, head: Unembedding) -> Tensor:
    """Coordinates in which the difference of some states has variance 1, those that matter first.

    Args:
        states: From which the differences are told, shape [rows, hidden].
        difference: Of the same shape.
        head: From states to logits.

    Returns:
        B, shape [hidden, hidden].
    """
    difference = difference.double()
    covariance = difference.T @ difference / max(1, len(difference))
    size = covariance.diagonal().mean().clamp(min=1e-12)
    identity = torch.eye(len(covariance), dtype=covariance.dtype)
    whole = (1 - _SHRINKAGE) * covariance + _SHRINKAGE * size * identity
    white = torch.linalg.cholesky(whole)
    with torch.no_grad():
        chosen = _some(states).float()
        probs = torch.cat(
            [head.logits(s).float().cpu().softmax(-1) for s in chosen.split(MOST_ROWS)]
        )
        metric = torch.zeros_like(covariance)
        means = torch.zeros(len(chosen), len(covariance), dtype=covariance.dtype)
        for rows in torch.arange(probs.shape[1]).split(TOKEN_BLOCK):
            token_rows, shares = head.weight[rows].double().cpu() @ white, probs[:, rows].double()
            metric += (token_rows * shares.sum(0)[:, None]).T @ token_rows
            means += shares @ token_rows
        metric -= means.T @ means
    return (white @ torch.linalg.eigh(metric).eigenvectors.flip(1)).float()


def _unexpected(probs: Tensor, weights: Tensor) -> Unexpected:
    """What the expert expects beside the foretold weights."""
    is_so = (probs > LEAST_PROB) & (probs > LEAST_RATIO * weights)
    top, ids = torch.where(is_so, probs, 0.0).topk(min(MOST_UNEXPECTED, probs.shape[1]), -1)
    room = MOST_UNEXPECTED - ids.shape[1]
    ids = torch.where(top > 0, ids, -1).int()
    levels = torch.where(top > 0, -top.clamp(min=LEAST_PROB).log2().round(), 0.0).int()
    return Unexpected(
        torch.nn.functional.pad(ids, (0, room), value=-1),
        torch.nn.functional.pad(levels, (0, room)),
    )


def _with(weights: Tensor, unexpected: Unexpected) -> Tensor:
    """Weights with those of unexpected tokens in place of the foretold ones."""
    has = unexpected.token_ids >= 0
    row = torch.arange(len(weights))[:, None].expand_as(has)[has]
    both = weights.clone()
    both[row, unexpected.token_ids[has].long()] = 2.0 ** -unexpected.levels[has].float()
    return both


def _rounded(coordinates: Tensor, factor: Tensor) -> Tensor:
    """Multiples of each coordinate's spacing, int16, shape [rows, hidden]."""
    size = factor.diagonal(dim1=1, dim2=2)
    ratios = factor / size[:, :, None]
    left = torch.zeros_like(coordinates)
    numbers = torch.zeros_like(coordinates)
    for place in range(coordinates.shape[1] - 1, -1, -1):
        after = slice(place + 1, None)
        made_up = (ratios[:, place, after] * left[:, after]).sum(-1)
        spacing = SPACING / size[:, place]
        number = ((coordinates[:, place] + made_up) / spacing).round()
        number = torch.where(size[:, place] < FEWEST_R, 0.0, number)
        numbers[:, place] = number.clamp(-LARGEST_NUMBER, LARGEST_NUMBER)
        left[:, place] = coordinates[:, place] - numbers[:, place] * spacing
    return numbers.to(torch.int16)
