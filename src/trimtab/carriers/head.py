"""The head: a light low-rank layer that predicts how the expert shifts its reference."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trimtab.anchors import Reading
from trimtab.errors import NumericalError
from trimtab.losses import kl_nats
from trimtab.vocab import Vocabulary

MIN_STD_SHARE = 1e-3
"""Least standard deviation of a feature, as a share of the mean one."""


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
class HeadData:
    """What a head is fitted to; all states are of the same positions.

    Attributes:
        hidden: States that the head will read, shape [positions, hidden]: the reference's, or in
            a host-fit the host's.
        base_logits: From a batch of positions to the logits that the head shifts, over the
            active tokens, shape [batch, active].
        target_logits: From a batch of positions to the logits to follow, same shape.
        weight: How much a position counts, shape [positions].
    """

    hidden: Tensor
    base_logits: Callable[[Tensor], Tensor]
    target_logits: Callable[[Tensor], Tensor]
    weight: Tensor


@dataclass(frozen=True)
class HeadSettings:
    """How a head is fitted; see `FitConfig`."""

    rank: int
    epochs: int
    learning_rate: float
    seed: int
    batch_positions: int = 512
    weight_decay: float = 0.05


def fit_head(
    data: HeadData,
    rows: Tensor,
    mean: Tensor,
    std: Tensor,
    settings: HeadSettings,
    *,
    on_batch: Callable[[int], None] = lambda _: None,
) -> Head:
    """Fit a head by KL(target || shifted base), from the identity.

    `up` and `offset` start at zero, so the head starts as no change and weight decay pulls it
    back to none. Positions of general text have the base itself as their target: there the same
    loss says "do nothing". Hidden features are standardised while fitting, since their scales
    differ by orders of magnitude, and the scale is folded into `down` at the end.

    Args:
        data: States, logits and weights.
        rows: Unembedding rows of the active tokens, times the logit scale, [active, hidden].
        mean: Mean state of general text, shape [hidden].
        std: Standard deviations of general text, shape [hidden].
        settings: Rank, passes, step size.
        on_batch: Told how many positions were just used.

    Raises:
        NumericalError: The loss is not finite.
    """
    # A feature that general text never moves must not be blown up without bound.
    std = std.clamp_min(MIN_STD_SHARE * float(std.mean()))
    generator = torch.Generator().manual_seed(settings.seed)
    hidden = rows.shape[1]
    down = torch.randn(settings.rank, hidden, generator=generator) / hidden**0.5
    up = torch.zeros(hidden, settings.rank)
    offset = torch.zeros(hidden)
    optimiser, schedule = _optimiser([down, up, offset], len(data.hidden), settings)
    for _ in range(settings.epochs):
        order = torch.randperm(len(data.hidden), generator=generator)
        for batch in order.split(settings.batch_positions):
            state = (data.hidden[batch].float() - mean) / std
            shift = state @ down.T @ (rows @ up).T + rows @ offset
            with torch.no_grad():
                base, target = data.base_logits(batch), data.target_logits(batch)
            loss = (kl_nats(target, base + shift) * data.weight[batch]).mean()
            if not torch.isfinite(loss):
                raise NumericalError(
                    "the head's loss is not a finite number",
                    hint="lower --learning-rate, or record again if the recording has bad values",
                )
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
            on_batch(len(batch))
    folded = down.detach() / std
    return Head(folded, up.detach(), offset.detach(), mean)


def _optimiser(
    parameters: list[Tensor], positions: int, settings: HeadSettings
) -> tuple[torch.optim.AdamW, torch.optim.lr_scheduler.OneCycleLR]:
    optimiser = torch.optim.AdamW(
        [p.requires_grad_() for p in parameters],
        settings.learning_rate,
        weight_decay=settings.weight_decay,
    )
    batches = -(-positions // settings.batch_positions)
    return optimiser, torch.optim.lr_scheduler.OneCycleLR(
        optimiser, settings.learning_rate, total_steps=settings.epochs * batches
    )


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
        return self.reading(hidden) @ self.rows[token_ids].T + self.bias[token_ids]


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
    source = torch.full((len(host),), -1)
    for token_id, text in enumerate(host.token_bytes):
        for length in range(len(text or b""), 0, -1):
            found = known.get((text or b"")[:length])
            if found is not None:
                source[token_id] = found
                break
    seated = string_rows[source.clamp_min(0)] * (source >= 0)[:, None]
    return seated[:, :-1].contiguous(), seated[:, -1].contiguous()
