"""How a next-token distribution is made small: packed top-k with its tail, or unbiased draws."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

Columns = Mapping[str, Tensor]
"""Named tensors whose rows are positions; the form in which encodings are stored."""

CHUNK_ELEMENTS = 2**23
"""Logits that are held in float32 at once (32 MiB)."""

CHUNK_ROWS = 256
"""Positions that are encoded at once at most."""


def chunk_rows(vocab: int) -> int:
    """How many positions' logits may be held at once; at least 1."""
    return max(1, min(CHUNK_ROWS, CHUNK_ELEMENTS // vocab))


def bits_needed(values: int) -> int:
    """Bits that tell so many values apart; at least 1."""
    return max(1, (values - 1).bit_length())


def pack_bits(values: Tensor, bits: int) -> Tensor:
    """Store whole numbers in the given number of bits, least significant first.

    Args:
        values: Numbers in [0, 2**bits), shape [rows, columns].
        bits: Width of one number, 1 to 31.

    Returns:
        Bytes, each row padded to whole bytes, shape [rows, ceil(columns * bits / 8)].

    Raises:
        ValueError: A number does not fit.
    """
    numbers = values.cpu().numpy().astype(np.int64)
    if numbers.size and (numbers.min() < 0 or numbers.max() >> bits):
        raise ValueError(f"numbers {numbers.min()} to {numbers.max()} do not fit in {bits} bits")
    packed = np.empty((len(numbers), -(-numbers.shape[1] * bits // 8)), np.uint8)
    # A bit takes eight bytes in between.
    for start in range(0, len(numbers), CHUNK_ROWS):
        some = numbers[start : start + CHUNK_ROWS]
        shifted = (some[:, :, None] >> np.arange(bits)) & 1
        flat = shifted.astype(np.uint8).reshape(len(some), some.shape[1] * bits)
        packed[start : start + len(some)] = np.packbits(flat, axis=1, bitorder="little")
    return torch.from_numpy(packed)


def unpack_bits(packed: Tensor, bits: int, columns: int) -> Tensor:
    """Invert `pack_bits`.

    Args:
        packed: Bytes, shape [rows, ceil(columns * bits / 8)].
        bits: Width of one number.
        columns: Numbers in a row.

    Returns:
        Numbers as int32, shape [rows, columns].
    """
    flat = np.unpackbits(packed.numpy(), axis=1, count=columns * bits, bitorder="little")
    numbers = flat.reshape(len(flat), columns, bits).astype(np.int32) << np.arange(bits)
    return torch.from_numpy(numbers.sum(axis=2, dtype=np.int32))


def pack_ragged(values: Tensor, has: Tensor, bits: int) -> Tensor:
    """Store rows of unlike lengths one after the other, as `pack_bits`; their lengths apart.

    Args:
        values: Numbers in [0, 2**bits), shape [rows, most].
        has: Which of them there are, the first ones of each row, shape [rows, most].
        bits: Width of one number.

    Returns:
        Bytes of all rows in turn.
    """
    return pack_bits(values[has][None], bits)[0]


def unpack_ragged(packed: Tensor, has: Tensor, bits: int) -> Tensor:
    """Invert `pack_ragged`; int32, shape [rows, most], 0 where there is none."""
    numbers = torch.zeros(has.shape, dtype=torch.int32)
    numbers[has] = unpack_bits(packed[None], bits, int(has.sum()))[0]
    return numbers


@dataclass(frozen=True)
class TopK:
    """The likeliest tokens of a distribution, and how much is left for all others.

    Attributes:
        token_ids: Likeliest first, int32, shape [rows, topk].
        logprobs: In nats, shape [rows, topk].
        log_tail: Log of the probability of all other tokens, shape [rows]; -inf if none are left.
        log_normaliser: logits = logprobs + log_normaliser, shape [rows].
    """

    token_ids: Tensor
    logprobs: Tensor
    log_tail: Tensor
    log_normaliser: Tensor


def encode_topk(logits: Tensor, top_k: int) -> TopK:
    """Keep the `top_k` likeliest tokens, or all where the vocabulary is smaller.

    The tail is summed over the other tokens themselves: 1 - sum(top) would lose all digits of a
    small tail.

    Args:
        logits: Shape [rows, vocab].
        top_k: Tokens to keep.
    """
    logits = logits.float()
    top_logits, token_ids = logits.topk(min(top_k, logits.shape[-1]), dim=-1)
    log_normaliser = logits.logsumexp(-1)
    log_rest = logits.scatter(-1, token_ids, -torch.inf).logsumexp(-1)
    return TopK(
        token_ids.int(),
        top_logits - log_normaliser[:, None],
        log_rest - log_normaliser,
        log_normaliser,
    )


def normalised(topk: TopK) -> TopK:
    """Scale the top and the tail so that they sum to 1, which rounding had disturbed."""
    total = torch.logaddexp(topk.logprobs.logsumexp(-1), topk.log_tail)
    return TopK(
        topk.token_ids,
        topk.logprobs - total[:, None],
        topk.log_tail - total,
        topk.log_normaliser,
    )


def decode_topk(topk: TopK, vocab: int, stand_in: Tensor | None = None) -> Tensor:
    """Deal the tail out among the tokens outside the top.

    An expert's tail is much like its reference's: dealt out in the reference's proportions, 23
    tokens lose a tenth of what they lose with equal shares (docs/log.md, 2026-11-27).

    Args:
        topk: The encoded distributions.
        vocab: Size of the vocabulary.
        stand_in: Logits in whose proportions the tail is dealt out, shape [rows, vocab] (default:
            all others alike).

    Returns:
        Log-probabilities in nats, shape [rows, vocab].
    """
    token_ids = topk.token_ids.long()
    others = vocab - token_ids.shape[1]
    if stand_in is not None and others:
        tail = stand_in.float().scatter(-1, token_ids, -torch.inf).log_softmax(-1)
        return (tail + topk.log_tail[:, None]).scatter(-1, token_ids, topk.logprobs)
    share = topk.log_tail - (float(np.log(others)) if others else 0.0)
    spread = share[:, None].expand(-1, vocab).clone()
    return spread.scatter(-1, token_ids, topk.logprobs)


def pack_topk(topk: TopK, vocab: int) -> dict[str, Tensor]:
    """Store ids in the fewest bits, log-probabilities as float16, the normaliser as float32."""
    return {
        "top_ids": pack_bits(topk.token_ids, bits_needed(vocab)),
        "top_logprobs": topk.logprobs.half(),
        "log_tail": topk.log_tail.half(),
        "log_normaliser": topk.log_normaliser.float(),
    }


def unpack_topk(columns: Columns, vocab: int) -> TopK:
    """Invert `pack_topk`; the result sums to 1 in spite of the rounding."""
    kept = columns["top_logprobs"].shape[1]
    return normalised(
        TopK(
            unpack_bits(columns["top_ids"], bits_needed(vocab), kept),
            columns["top_logprobs"].float(),
            columns["log_tail"].float(),
            columns["log_normaliser"],
        )
    )


@dataclass(frozen=True)
class Samples:
    """Independent draws from a distribution, counted.

    Attributes:
        token_ids: Distinct drawn tokens, ascending, then -1; int32, shape [rows, draws].
        counts: How often each was drawn, then 0; int32, shape [rows, draws].
    """

    token_ids: Tensor
    counts: Tensor


def encode_samples(logits: Tensor, uniforms: Tensor) -> Samples:
    """Draw tokens by their probabilities and count them.

    This is RS-KD (arXiv 2503.16870) with the expert itself as proposal: counts / draws is an
    unbiased estimate of every token's probability, which a truncated top-k is not.

    Args:
        logits: Shape [rows, vocab].
        uniforms: Independent numbers in [0, 1) as float64, shape [rows, draws]; the only
            randomness, so that the result does not depend on how rows are batched.
    """
    cumulative = logits.double().softmax(-1).cumsum(-1)
    # Searching to the right never lands on a token of probability 0.
    drawn = torch.searchsorted(cumulative, uniforms * cumulative[:, -1:], right=True)
    return _counted(drawn.clamp(max=logits.shape[-1] - 1))


def _counted(drawn: Tensor) -> Samples:
    ordered = drawn.sort(-1).values
    starts = torch.ones_like(ordered, dtype=torch.bool)
    starts[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    place = starts.cumsum(-1) - 1
    counts = torch.zeros_like(ordered).scatter_add(-1, place, torch.ones_like(ordered))
    token_ids = torch.full_like(ordered, -1).scatter(-1, place, ordered)
    return Samples(token_ids.int(), counts.int())


def decode_samples(samples: Samples, vocab: int) -> Tensor:
    """Estimate the probabilities without bias; tokens that were not drawn get 0.

    Returns:
        Probabilities, shape [rows, vocab].
    """
    shares = samples.counts / samples.counts.sum(-1, keepdim=True)
    probs = torch.zeros(len(shares), vocab, device=shares.device)
    return probs.scatter_add(-1, samples.token_ids.clamp(min=0).long(), shares)


def pack_samples(samples: Samples, vocab: int) -> dict[str, Tensor]:
    """Store distinct ids and counts without padding, in the fewest bits.

    The ids and counts of all rows follow each other, so these two columns' rows are bytes.
    """
    drawn = samples.counts > 0
    draws = samples.counts.shape[1]
    return {
        "sample_sizes": drawn.sum(-1).to(torch.int16),
        "sample_ids": pack_ragged(samples.token_ids, drawn, bits_needed(vocab)),
        "sample_counts": pack_ragged(samples.counts - 1, drawn, bits_needed(draws)),
    }


def unpack_samples(columns: Columns, draws: int, vocab: int) -> Samples:
    """Invert `pack_samples`."""
    drawn = torch.arange(draws) < columns["sample_sizes"].long()[:, None]
    token_ids = unpack_ragged(columns["sample_ids"], drawn, bits_needed(vocab))
    counts = unpack_ragged(columns["sample_counts"], drawn, bits_needed(draws))
    return Samples(token_ids.masked_fill(~drawn, -1), counts + drawn)
