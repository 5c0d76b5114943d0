r"""An expert's states in few bytes, where the reference's states are known.

What is stored is the difference d of both states, as whole numbers n in coordinates of its own,
d = B z. A small error e of z costs KL(expert, stored) about e' M e / 2 nats, where M is the
covariance of the logits' coordinates J = W B over the next token. M is another one at each
position, and what tells it well enough is known to the reader too: the reference's distribution,
and the ids of the few tokens that the expert expects and the reference does not. So each position
has steps of its own, wide where no likely token depends on a coordinate.

With the Cholesky factor R'R = M / step^2 + I, where I stands for a z of variance 1, the coordinates
are rounded one after the other to multiples of SPACING / R_ii, and what each has been rounded by is
made up for by those that follow (Babai's nearest plane, as in GPTQ, arXiv 2210.17323). The sum of
log R_ii is the rate at which a Gaussian z can be told to this precision. The numbers are Rice codes
that need none of this to be read, so that rounding on another machine changes a state by as
little as the factor, and never what the bits mean.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from trimtab.encoding import pack_ragged, unpack_ragged
from trimtab.losses import kl_nats
from trimtab.rice import decode_rows, encode_rows
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

MOST_UNEXPECTED = 32
LEAST_PROB, LEAST_RATIO = 0.003, 4.0
"""A token is unexpected where the expert gives it so much, and so many times its weight."""

_LEVEL_BITS = 4

STATE_COLUMNS = (
    "codes",
    "code_sizes",
    "unexpected_sizes",
    "unexpected_ids",
    "unexpected_levels",
)
"""What is stored of some states; all but the sizes are bytes of all rows in turn."""

SAMPLE_ROWS = 2_048
"""Positions that a code is made of, about."""

ROWS_PACKED = 256
"""Rows that are made bits of at once; each is whole bytes."""

LIKELY_TOKENS, FLATTENING = 512, 0.7
STEP_SHARES = (0.02, 0.017, 0.014, 0.012, 0.01, 0.008, 0.006)
"""Steps to choose from, over the root of KL(expert, reference)."""

MOST_LOST = 0.008
"""KL(expert, stored) over KL(expert, reference) that a step may cost, on states of which the
coordinates were not made."""

TRIED_ROWS = 128

_FISHER_ROWS = 256
_LEAST_NATS = 1e-5
_SHRINKAGE = 0.2


@dataclass(frozen=True)
class Precision:
    """What writer and reader of states agree on.

    Attributes:
        step: Precision of a coordinate in the root of nats; smaller is better and larger.
        likely_tokens: The reference's likeliest tokens, which tell how a logit matters.
        flattening: Power of their probabilities, below 1 since the expert may think otherwise.
    """

    step: float
    likely_tokens: int
    flattening: float


@dataclass(frozen=True)
class Unexpected:
    """Tokens that the expert expects and the reference does not, by position.

    Attributes:
        token_ids: Likeliest first, then -1; int32, shape [rows, MOST_UNEXPECTED].
        levels: Probability under the expert as -log2, rounded; int32, of the same shape.
    """

    token_ids: Tensor
    levels: Tensor


@dataclass(frozen=True)
class StoredStates:
    """What is stored of the expert's states.

    Attributes:
        numbers: Coordinates of the difference in steps, int16, shape [rows, hidden].
        unexpected: Tokens that the steps depend on beside the reference's own.
    """

    numbers: Tensor
    unexpected: Unexpected


@dataclass(frozen=True)
class StateCode:
    """From states to what is stored, and back.

    Attributes:
        basis: B, shape [hidden, hidden].
        head: Of reference and expert alike.
        precision: Steps and what they depend on.
    """

    basis: Tensor
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
        inverse = torch.linalg.inv(self.basis.double()).float().T
        token_rows = self._token_rows()
        parts = []
        size = _rows_at_once(reference.shape[1])
        for ours, theirs in zip(reference.split(size), expert.split(size), strict=True):
            ours, theirs = ours.float(), theirs.float()
            probs = self._probs(ours)
            weights = self._weights(probs)
            unexpected = _unexpected(self._probs(theirs), weights)
            factor = self._factor(_with(weights, unexpected), token_rows)
            parts.append((_rounded((theirs - ours) @ inverse, factor), unexpected))
            if advance is not None:
                advance(len(ours))
        numbers, found = zip(*parts, strict=True)
        ids, levels = (torch.cat([getattr(u, n) for u in found]) for n in ("token_ids", "levels"))
        return StoredStates(torch.cat(numbers), Unexpected(ids, levels))

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
            ours = reference[rows].float()
            both = stored.unexpected
            unexpected = Unexpected(both.token_ids[rows], both.levels[rows])
            weights = _with(self._weights(self._probs(ours)), unexpected)
            spacing = SPACING / self._factor(weights, token_rows).diagonal(dim1=1, dim2=2)
            states.append(ours + (stored.numbers[rows].float() * spacing) @ self.basis.T)
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

    def _probs(self, states: Tensor) -> Tensor:
        with torch.no_grad():
            return self.head.logits(states).float().cpu().softmax(-1)

    def _weights(self, probs: Tensor) -> Tensor:
        """How much each token's logit matters, as far as the reference tells, [rows, vocab].

        They go to zero towards the least of the likely tokens, so that it does not matter which of
        two is the last one of them.
        """
        count = min(self.precision.likely_tokens, probs.shape[1] - 1)
        top, ids = probs.topk(count + 1, -1)
        above = (top[:, :-1] - top[:, -1:]) ** self.precision.flattening
        above = above / above.sum(-1, keepdim=True).clamp(min=torch.finfo(above.dtype).tiny)
        return torch.zeros_like(probs).scatter(1, ids[:, :-1], above)

    def _factor(self, weights: Tensor, token_rows: Tensor) -> Tensor:
        """R, shape [rows, hidden, hidden]."""
        count = int((weights > 0).sum(-1).max())
        top, ids = (weights / weights.sum(-1, keepdim=True)).topk(count, -1)
        rows = token_rows[ids]
        centred = (rows - (top[:, :, None] * rows).sum(1, keepdim=True)) * top.sqrt()[:, :, None]
        metric = centred.transpose(1, 2) @ centred / self.precision.step**2
        metric.diagonal(dim1=1, dim2=2).add_(1.0)
        return torch.linalg.cholesky(metric, upper=True)


def _rows_at_once(hidden: int) -> int:
    return max(1, min(MOST_ROWS, MATRIX_NUMBERS // hidden**2))


def code_for(reference: Tensor, expert: Tensor, head: Unembedding) -> StateCode:
    """A code for states like these: its coordinates, and the widest step that loses little.

    Args:
        reference: Some states, shape [rows, hidden].
        expert: Of the same shape.
        head: Of both.
    """
    reference, expert = reference.cpu().float(), expert.cpu().float()
    every = max(2, len(reference) // TRIED_ROWS)
    is_tried = torch.arange(len(reference)) % every == 0
    basis = difference_basis(reference[~is_tried], expert[~is_tried], head)
    ours, theirs = reference[is_tried], expert[is_tried]
    # Two models that say the same need no finer steps than float16 has.
    between = max(_nats(head, theirs, ours), _LEAST_NATS)
    code = StateCode(basis, head, Precision(between**0.5, LIKELY_TOKENS, FLATTENING))
    for share in STEP_SHARES:
        code = replace(code, precision=replace(code.precision, step=share * between**0.5))
        lost = _nats(head, theirs, code.decode(ours, code.encode(ours, theirs)))
        if lost <= MOST_LOST * between:
            break
    return code


def _nats(head: Unembedding, one: Tensor, other: Tensor) -> float:
    """KL(one, other), mean over some states."""
    sums = 0.0
    with torch.no_grad():
        for pair in zip(one.split(MOST_ROWS), other.split(MOST_ROWS), strict=True):
            ours, theirs = (head.logits(states).double().cpu() for states in pair)
            sums += float(kl_nats(ours, theirs).sum())
    return sums / max(1, len(one))


def _some(states: Tensor) -> Tensor:
    """Rows from all over, for what takes the whole vocabulary."""
    return states[:: max(1, len(states) // _FISHER_ROWS)]


def difference_basis(reference: Tensor, expert: Tensor, head: Unembedding) -> Tensor:
    """Coordinates in which the difference of some states has variance 1, those that matter first.

    Args:
        reference: Shape [rows, hidden].
        expert: Of the same shape.
        head: Of both.

    Returns:
        B, shape [hidden, hidden].
    """
    reference, difference = reference.double(), (expert.double() - reference.double())
    covariance = difference.T @ difference / max(1, len(difference))
    size = covariance.diagonal().mean().clamp(min=1e-12)
    identity = torch.eye(len(covariance), dtype=covariance.dtype)
    whole = (1 - _SHRINKAGE) * covariance + _SHRINKAGE * size * identity
    white = torch.linalg.cholesky(whole)
    with torch.no_grad():
        chosen = _some(reference).float()
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


def pack_states(stored: StoredStates, id_bits: int) -> dict[str, Tensor]:
    """Lay states out as columns, of which all but the sizes are bytes of all rows in turn.

    Args:
        stored: What is stored.
        id_bits: Bits of a token id.
    """
    parts = [
        encode_rows(some.numpy().astype(np.int64)) for some in stored.numbers.split(ROWS_PACKED)
    ]
    packed, sizes = (np.concatenate(side) for side in zip(*parts, strict=True))
    has = stored.unexpected.token_ids >= 0
    return {
        "codes": torch.from_numpy(packed),
        "code_sizes": torch.from_numpy(sizes.astype(np.int16)),
        "unexpected_sizes": has.sum(-1).to(torch.uint8),
        "unexpected_ids": pack_ragged(stored.unexpected.token_ids, has, id_bits),
        "unexpected_levels": pack_ragged(stored.unexpected.levels, has, _LEVEL_BITS),
    }


def unpack_states(columns: Mapping[str, Tensor], hidden: int, id_bits: int) -> StoredStates:
    """Invert `pack_states`.

    Args:
        columns: As it gave them.
        hidden: Size of a state.
        id_bits: Bits of a token id.

    Raises:
        ValueError: The columns are no such states.
    """
    sizes = columns["code_sizes"].numpy().astype(np.int64)
    numbers = decode_rows(columns["codes"].numpy(), sizes, hidden)
    counts = columns["unexpected_sizes"].long()
    if counts.shape != sizes.shape or int(counts.max() if len(counts) else 0) > MOST_UNEXPECTED:
        raise ValueError("the numbers of unexpected tokens cannot be")
    has = torch.arange(MOST_UNEXPECTED) < counts[:, None]
    ids = unpack_ragged(columns["unexpected_ids"], has, id_bits).masked_fill(~has, -1)
    levels = unpack_ragged(columns["unexpected_levels"], has, _LEVEL_BITS)
    return StoredStates(torch.from_numpy(numbers.astype(np.int16)), Unexpected(ids, levels))


def _unexpected(probs: Tensor, weights: Tensor) -> Unexpected:
    """What the expert expects beside the reference's weights."""
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
    """Weights with those of unexpected tokens in place of the reference's."""
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
