"""What a memory's entries propose, in the tokens of whoever asks."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trimtab.align.strings import Strings
from trimtab.carriers.memory import VALUE_BYTES, Memory

FOLLOWED_SHARE = 0.5
"""Share of a soft entry that goes to what followed; see `propose`."""


@dataclass(frozen=True)
class Proposals:
    """A distribution over a model's tokens for each entry of a memory.

    Attributes:
        values: Token ids, -1 for none, shape [entries, proposals].
        shares: Their probabilities, a row summing to at most one, shape [entries, proposals].
    """

    values: Tensor
    shares: Tensor


def followed(memory: Memory) -> list[bytes]:
    """The bytes after each entry, at most VALUE_BYTES, to the document's end."""
    raw = memory.text.numpy().tobytes()
    return [raw[p : p + VALUE_BYTES].split(b"\0")[0] for p in memory.positions.tolist()]


def first_tokens(texts: Sequence[bytes], encode: Callable[[str], Sequence[int]]) -> Tensor:
    """First token of each text as a tokenizer cuts it, -1 for none, shape [texts]."""
    first: dict[bytes, int] = {}
    for text in texts:
        if text not in first:
            ids = encode(text.decode("utf-8", "ignore")) if text else []
            first[text] = ids[0] if ids else -1
    return torch.tensor([first[text] for text in texts], dtype=torch.long)


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
    texts = memory.soft_strings
    begins = [
        [texts[i] != b"" and after.startswith(texts[i]) for i in row]
        for after, row in zip(followed(memory), memory.soft_ids.tolist(), strict=True)
    ]
    soft = torch.where(torch.tensor(begins), values, first[memory.soft_ids.long()])
    hard = torch.full(values.shape, FOLLOWED_SHARE)
    shares = torch.cat([hard, (1.0 - FOLLOWED_SHARE) * memory.soft_probs.float()], 1)
    return Proposals(torch.cat([values, soft], 1), shares)
