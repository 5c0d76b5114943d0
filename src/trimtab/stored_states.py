"""What is stored of an expert's states, and the columns of a shard that hold it."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from trimtab.encoding import CHUNK_ROWS, pack_ragged, unpack_ragged
from trimtab.rice import decode_rows, encode_rows

MOST_UNEXPECTED = 32
"""Of one position."""

_LEVEL_BITS = 4

MOST_HALVINGS = 7

STATE_COLUMNS = (
    "codes",
    "code_sizes",
    "halvings",
    "unexpected_sizes",
    "unexpected_ids",
    "unexpected_levels",
)
"""What is stored of some states; all but the sizes are bytes of all rows in turn."""


@dataclass(frozen=True)
class Unexpected:
    """Tokens that the expert expects and the foretold state does not, by position.

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
        halvings: How often a position's step is halved, uint8, shape [rows].
        unexpected: Tokens that the steps depend on beside the foretold ones.
    """

    numbers: Tensor
    halvings: Tensor
    unexpected: Unexpected

    @staticmethod
    def empty(rows: int, hidden: int) -> "StoredStates":
        """Of so many states, to be filled in."""
        ids = torch.full((rows, MOST_UNEXPECTED), -1, dtype=torch.int32)
        return StoredStates(
            torch.zeros(rows, hidden, dtype=torch.int16),
            torch.zeros(rows, dtype=torch.uint8),
            Unexpected(ids, torch.zeros_like(ids)),
        )

    def rows(self, some: slice) -> "StoredStates":
        """What is stored of some of the states."""
        both = self.unexpected
        unexpected = Unexpected(both.token_ids[some], both.levels[some])
        return StoredStates(self.numbers[some], self.halvings[some], unexpected)


def pack_states(stored: StoredStates, id_bits: int) -> dict[str, Tensor]:
    """Lay states out as columns, of which all but the sizes are bytes of all rows in turn.

    Args:
        stored: What is stored.
        id_bits: Bits of a token id.
    """
    parts = [
        encode_rows(some.numpy().astype(np.int64)) for some in stored.numbers.split(CHUNK_ROWS)
    ]
    packed, sizes = (np.concatenate(side) for side in zip(*parts, strict=True))
    has = stored.unexpected.token_ids >= 0
    return {
        "codes": torch.from_numpy(packed),
        "code_sizes": torch.from_numpy(sizes.astype(np.int16)),
        "halvings": stored.halvings,
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
    halvings = columns["halvings"]
    if halvings.shape != sizes.shape or int(halvings.max() if len(halvings) else 0) > MOST_HALVINGS:
        raise ValueError("steps are halved more often than can be")
    return StoredStates(
        torch.from_numpy(numbers.astype(np.int16)), halvings, Unexpected(ids, levels)
    )
