"""The head: a light low-rank layer that predicts how the expert shifts its reference."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trimtab.anchors import Reading
from trimtab.vocab import Vocabulary


@dataclass(frozen=True)
class Head:
    """A shift of the small model's final hidden state: up @ down @ (h - mean) + offset.

    Added before the unembedding W it shifts the logits by W (up down (h - mean) + offset), whose
    linear part is a LoRA on `lm_head` with lora_A = down and lora_B = W up.

    Attributes:
        down: Shape [rank, hidden].
        up: Shape [hidden, rank].
        offset: Shape [hidden]; a static vocabulary bias.
        mean: Mean hidden state of general text, shape [hidden].
    """

    down: Tensor
    up: Tensor
    offset: Tensor
    mean: Tensor

    def shift(self, hidden: Tensor) -> Tensor:
        """Shift of hidden states, shape [..., hidden] for states of that shape."""
        return (hidden - self.mean) @ self.down.T @ self.up.T + self.offset

    def tensors(self) -> dict[str, Tensor]:
        """The weights by name, as head.safetensors holds them."""
        return {
            "down": self.down,
            "up": self.up,
            "offset": self.offset,
            "mean": self.mean,
        }


@dataclass(frozen=True)
class MountedHead:
    """A head seated on a host: logits += rows @ reading(h) + bias.

    Attributes:
        reading: From the host's state to down @ (h - mean) of the small model's.
        rows: W_A up by the host's token strings, shape [vocab of host, rank].
        bias: W_A offset likewise: the static part, shape [vocab of host].
    """

    reading: Reading
    rows: Tensor
    bias: Tensor

    def shift(self, hidden: Tensor) -> Tensor:
        """Shift of the host's logits, shape [..., vocab], for states [..., hidden of host]."""
        return self.reading(hidden) @ self.rows.T + self.bias

    def shift_of(self, hidden: Tensor, token_ids: Tensor) -> Tensor:
        """The same for some tokens only, shape [..., chosen]."""
        # Four times as fast as indexing.
        chosen = self.rows.index_select(0, token_ids)
        return self.reading(hidden) @ chosen.T + self.bias[token_ids]


def seat_rows(
    strings: Sequence[bytes], string_rows: Tensor, host: Vocabulary
) -> tuple[Tensor, Tensor]:
    """Carry a head's token rows to a host's tokens.

    A string that the small model has keeps its row. Another host token takes the row of the
    longest string that begins it: by the chain rule its log-probability shifts by that of its
    first small token plus that of the rest, and the rest is not known here.

    Args:
        strings: The small model's token strings.
        string_rows: Their rows, shape [strings, rank + 1].
        host: The host's vocabulary.

    Returns:
        Rows [vocab, rank] and bias [vocab] of the host's tokens; zero for special tokens.
    """
    known = {string: i for i, string in enumerate(strings)}
    longest = max(map(len, strings), default=0)
    source = torch.tensor([_beginning(text or b"", known, longest) for text in host.token_bytes])
    seated = string_rows[source.clamp_min(0)] * (source >= 0)[:, None]
    return seated[:, :-1].contiguous(), seated[:, -1].contiguous()


def _beginning(text: bytes, known: Mapping[bytes, int], longest: int) -> int:
    """The number of the longest known string that begins a text; -1 if none does."""
    for length in range(min(len(text), longest), 0, -1):
        found = known.get(text[:length])
        if found is not None:
            return found
    return -1
