"""What a memory's entries propose, in the tokens of whoever asks."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trimtab.align.strings import Strings
from trimtab.carriers.memory import VALUE_BYTES, Memory

FOLLOWED_SHARE = 0.5
"""Share of a soft entry that goes to what followed; see `propose`."""

BLOCK_ENTRIES = 16_384
"""Entries that are looked at at once, so that many take no more room than few."""


@dataclass(frozen=True)
class Proposals:
    """A distribution over a model's tokens for each entry of a memory.

    Attributes:
        values: Token ids, -1 for none, shape [entries, proposals].
        shares: Their probabilities, a row summing to at most one, shape [entries, proposals].
    """

    values: Tensor
    shares: Tensor


def followed(memory: Memory) -> Iterator[NDArray[np.bytes_]]:
    """The bytes after each entry, at most VALUE_BYTES, to the document's end; block by block."""
    for positions in memory.positions.split(BLOCK_ENTRIES):
        # A text ends with zero bytes, as each of its documents does.
        places = (positions[:, None] + torch.arange(VALUE_BYTES)).clamp_max(len(memory.text) - 1)
        read = memory.text[places]
        read[(read == 0).cumsum(1) > 0] = 0
        # Which leaves out zeros at the end.
        yield read.numpy().view(f"S{VALUE_BYTES}")[:, 0]


def first_tokens(memory: Memory, first: Callable[[Sequence[bytes]], Sequence[int]]) -> Tensor:
    """The token that begins what followed each entry, -1 for none, shape [entries].

    Args:
        memory: The entries.
        first: The token that begins each of some texts, which are different ones, -1 for none.
    """
    found = [torch.zeros(0, dtype=torch.long)]
    for block in followed(memory):
        texts, places = np.unique(block, return_inverse=True)
        found.append(torch.tensor(first(texts.tolist()))[torch.from_numpy(places)])
    return torch.cat(found)


def propose(memory: Memory, following: Tensor, strings: Strings) -> Proposals:
    """Say in a model's tokens what each entry of a memory answers.

    A hard entry answers with the token that followed it. A soft entry is the even mixture of that
    token and of the expert's distribution. What followed is the text itself, and the one thing
    that names and idioms need; the expert's view tells the chance part of it from the rest, and
    says what else could have come. Neither is right everywhere, and an even mixture pays at most
    ln 2 nats against the better one, whichever it is.

    A token string t of the expert's that begins the bytes that followed counts for the token that
    followed; any other for the token with which the model begins t, as in `Alignment`. Proposals
    of the same token add up wherever they are used. Strings that no token begins are left out.

    Args:
        memory: The entries.
        following: The model's token after each, -1 for none, shape [entries].
        strings: The model's token strings.
    """
    values = following[:, None]
    if memory.soft_ids is None or memory.soft_probs is None:
        return Proposals(values, torch.ones(values.shape))
    first = torch.tensor([strings.first_token(text) for text in memory.soft_strings])
    begins = torch.cat(list(_begins(memory, memory.soft_ids)))
    soft = torch.where(begins, values, first[memory.soft_ids.long()])
    hard = torch.full(values.shape, FOLLOWED_SHARE)
    shares = torch.cat([hard, (1.0 - FOLLOWED_SHARE) * memory.soft_probs.float()], 1)
    return Proposals(torch.cat([values, soft], 1), shares)


def _begins(memory: Memory, soft_ids: Tensor) -> Iterator[Tensor]:
    """Whether each of an entry's strings begins what followed it; blocks of `soft_ids`' shape."""
    texts = memory.soft_strings
    for block, ids in zip(followed(memory), soft_ids.split(BLOCK_ENTRIES), strict=True):
        rows = zip(block.tolist(), ids.tolist(), strict=True)
        yield torch.tensor(
            [[texts[i] != b"" and after.startswith(texts[i]) for i in row] for after, row in rows]
        )
