"""Whole numbers near zero in few bits: Rice codes, with a parameter for each few numbers of a row.

A number n >= 0 becomes n >> k ones, a zero, and its k lowest bits (Rice and Plaut, 1971), which is
nearly the shortest code where sizes fall off geometrically. As in FLAC, a row is divided into parts
that each say their own k, or that they are all zero: nothing but the bits is needed to read them.
"""

import numpy as np
from numpy.typing import NDArray

PART = 32
"""Numbers that share a parameter."""

_HEADER_BITS = 3
_PARAMETERS = np.array([0, 1, 2, 3, 5, 8, 12])
"""Parameters by a part's header, which is 0 where the part is all zero and else one more."""

Numbers = NDArray[np.int64]
Bytes = NDArray[np.uint8]


def encode_rows(values: Numbers) -> tuple[Bytes, Numbers]:
    """Encode rows of whole numbers.

    Args:
        values: Any whole numbers, those near zero shortest, shape [rows, columns].

    Returns:
        The bytes of all rows one after the other, each row padded to whole bytes, and how many
        bytes each row has, shape [rows].
    """
    rows = len(values)
    unsigned = _parted(np.where(values < 0, -2 * values - 1, 2 * values))
    headers = _headers(unsigned)
    is_kept = headers[:, :, None] > 0
    k = _PARAMETERS[np.maximum(headers - 1, 0)][:, :, None]
    ones = np.where(is_kept, unsigned >> k, 0)
    lengths = np.where(is_kept, ones + 1 + k, 0)
    each = np.concatenate([np.full((*headers.shape, 1), _HEADER_BITS), lengths], axis=2)
    flat = each.reshape(rows, each.shape[1] * each.shape[2])
    sizes = (flat.sum(1) + 7) // 8
    row_starts = 8 * (sizes.cumsum() - sizes)
    starts = (row_starts[:, None] + flat.cumsum(1) - flat).reshape(each.shape)
    bits = np.zeros(8 * int(sizes.sum()), np.uint8)
    _write(bits, starts[:, :, 0], headers, _HEADER_BITS)
    kept = np.broadcast_to(is_kept, ones.shape)
    first, count = starts[:, :, 1:][kept], ones[kept]
    total = int(count.sum())
    bits[np.repeat(first - (count.cumsum() - count), count) + np.arange(total)] = 1
    width = np.broadcast_to(k, ones.shape)[kept]
    low = unsigned[kept] & ((1 << width) - 1)
    _write(bits, first + count + 1, low, width)
    return np.packbits(bits, bitorder="little"), sizes


def decode_rows(packed: Bytes, sizes: Numbers, columns: int) -> Numbers:
    """Invert `encode_rows`.

    Args:
        packed: The bytes of all rows.
        sizes: How many bytes each row has.
        columns: Numbers in a row.

    Returns:
        Shape [rows, columns].

    Raises:
        ValueError: The bytes are not such rows.
    """
    if int(sizes.sum()) != len(packed):
        raise ValueError(f"{len(packed)} bytes are given, and the rows have {int(sizes.sum())}")
    bits = np.unpackbits(packed, bitorder="little")
    # Reading goes on beyond the end of a broken row; what it then says is found out below.
    bits = np.concatenate([bits, np.zeros(64, np.uint8)])
    zeros = np.where(bits == 0, np.arange(len(bits)), len(bits))
    next_zero = np.minimum.accumulate(zeros[::-1])[::-1]
    ends = 8 * sizes.cumsum()
    place = ends - 8 * sizes
    parts = -(-columns // PART)
    unsigned = np.zeros((len(sizes), parts * PART), np.int64)
    for part in range(parts):
        header = _read(bits, place, np.full(len(sizes), _HEADER_BITS))
        is_kept, k = header > 0, _PARAMETERS[np.maximum(header - 1, 0)]
        place = place + _HEADER_BITS
        for column in range(part * PART, (part + 1) * PART):
            stop = next_zero[np.minimum(place, len(bits) - 1)]
            low = _read(bits, stop + 1, k)
            unsigned[:, column] = np.where(is_kept, ((stop - place) << k) | low, 0)
            place = np.where(is_kept, stop + 1 + k, place)
    if not ((place <= ends) & (place > ends - 8)).all():
        raise ValueError("the bytes are no rows of Rice codes")
    numbers = unsigned[:, :columns]
    return np.where(numbers & 1, -(numbers + 1) // 2, numbers // 2)


def _parted(unsigned: Numbers) -> Numbers:
    """Rows in parts, filled up with zeros, shape [rows, parts, PART]."""
    rows, columns = unsigned.shape
    parts = -(-columns // PART)
    filled = np.zeros((rows, parts * PART), np.int64)
    filled[:, :columns] = unsigned
    return filled.reshape(rows, parts, PART)


def _headers(unsigned: Numbers) -> Numbers:
    """The header that makes each part shortest; 0 where it is all zero."""
    costs = [(unsigned >> k).sum(2) + k * PART for k in _PARAMETERS.tolist()]
    return np.where(unsigned.any(2), np.argmin(costs, axis=0) + 1, 0)


def _write(bits: Bytes, starts: Numbers, values: Numbers, widths: Numbers | int) -> None:
    """Put numbers of given widths down, least significant bits first."""
    for bit in range(int(np.max(widths, initial=0))):
        has = np.broadcast_to(bit < np.asarray(widths), starts.shape)
        bits[starts[has] + bit] = ((values >> bit) & 1)[has]


def _read(bits: Bytes, starts: Numbers, widths: Numbers) -> Numbers:
    found = np.zeros(len(starts), np.int64)
    for bit in range(int(np.max(widths, initial=0))):
        place = np.minimum(starts + bit, len(bits) - 1)
        found |= np.where(bit < widths, bits[place].astype(np.int64) << bit, 0)
    return found
