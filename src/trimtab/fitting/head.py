"""Fitting a head to soft targets, with checkpoints that continue exactly."""

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from trimtab.carriers.head import Head
from trimtab.errors import InputError, NumericalError
from trimtab.losses import kl_nats
from trimtab.store.files import writing_atomically

MIN_STD_SHARE = 1e-3
"""Least standard deviation of a feature, as a share of the mean one."""

ALWAYS, DRAWN = 1_024, 1_024
"""Active tokens that each step compares, and others that it draws. On two recordings a head that
compares so many of 8,192 followed unseen text about as closely as one that compares all of them, in
a quarter of the time (docs/log.md, 2026-11-26)."""

_NAMES = ("down", "up", "offset")
_MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class HeadData:
    """What a head is fitted to; all states are of the same positions.

    Attributes:
        hidden: States that the head will read, shape [positions, hidden]: the reference's, or in
            a host-fit the host's.
        logits: From a batch of positions [batch] and places among the active tokens [compared] to
            the logits that the head shifts and those to follow, each [batch, compared].
        weight: How much a position counts, shape [positions].
    """

    hidden: Tensor
    logits: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
    weight: Tensor


@dataclass(frozen=True)
class HeadSettings:
    """How a head is fitted; see `FitConfig`.

    Attributes:
        rank: Of the head.
        epochs: Passes over the positions.
        learning_rate: Peak of the one-cycle schedule.
        seed: Of the order of positions, the first weights, and the tokens that are drawn.
        batch_positions: Positions in a step.
        weight_decay: Of AdamW.
        always: First active tokens, which each step compares.
        drawn: Others that a step compares, drawn anew each time; None compares all of them.
    """

    rank: int
    epochs: int
    learning_rate: float
    seed: int
    batch_positions: int = 512
    weight_decay: float = 0.05
    always: int = ALWAYS
    drawn: int | None = DRAWN


@dataclass(frozen=True)
class Checkpoint:
    """Where a fit is saved, how often, and of which fit a saved state may be.

    Attributes:
        path: The file.
        every_sec: Seconds between two.
        fit: Tells one fit from another; a state of another one is not continued, and then
            written over.
    """

    path: Path
    every_sec: float
    fit: str


def fit_head(
    data: HeadData,
    rows: Tensor,
    moments: tuple[Tensor, Tensor],
    settings: HeadSettings,
    *,
    checkpoint: Checkpoint | None = None,
    on_batch: Callable[[int], None] = lambda _: None,
) -> Head:
    """Fit a head by KL(target || shifted base), from the identity.

    `up` and `offset` start at zero, so the head starts as no change and weight decay pulls it
    back to none. Positions of general text have the base itself as their target: there the same
    loss says "do nothing". Hidden features are standardised while fitting, since their scales
    differ by orders of magnitude, and the scale is folded into `down` at the end.

    A step compares some of the active tokens (`Compared`), so that its cost does not grow with
    their number.

    Args:
        data: States, logits and weights.
        rows: Unembedding rows of the active tokens, times the logit scale, [active, hidden]; the
            most frequent first.
        moments: Mean state of general text and its standard deviations, each [hidden].
        settings: Rank, passes, step size.
        checkpoint: Continue from there, bit for bit as if it had never stopped, and save there.
        on_batch: Told how many positions were just used.

    Raises:
        NumericalError: The loss is not finite.
        InputError: The checkpoint is broken.
        StorageError: A checkpoint cannot be written.
    """
    # A feature that general text never moves must not be blown up without bound.
    mean, std = moments
    std = std.clamp_min(MIN_STD_SHARE * float(std.mean()))
    generator = torch.Generator().manual_seed(settings.seed)
    training = _Training(rows.shape[1], len(data.hidden), settings, generator)
    done = training.load(checkpoint) if checkpoint else 0
    saved = time.monotonic()
    for step, batch in enumerate(_batches(len(data.hidden), settings, generator), 1):
        # Also for a step that is done already, so that the next one draws what it would have.
        compared = Compared.draw(len(rows), settings, generator)
        if step > done:
            training.step(_loss(training, data, rows, batch, compared, (mean, std)))
            if checkpoint and time.monotonic() - saved >= checkpoint.every_sec:
                training.save(checkpoint, step)
                saved = time.monotonic()
        on_batch(len(batch))
    down, up, offset = (weight.detach() for weight in training.weights)
    return Head(down / std, up, offset, mean)


def _batches(
    positions: int, settings: HeadSettings, generator: torch.Generator
) -> Iterator[Tensor]:
    for _ in range(settings.epochs):
        yield from torch.randperm(positions, generator=generator).split(settings.batch_positions)


@dataclass(frozen=True)
class Compared:
    """Tokens that a step compares.

    A token that was drawn stands for as many as it was drawn from: its share of a distribution's
    sum counts so many times, which is the exponential of `nats` added to its logit. Then the sums
    over the tokens, and with them the divergence, are what they are over all but for chance
    (sampled softmax, Bengio and Senecal 2008).

    Attributes:
        places: Among the active tokens, shape [compared].
        nats: Logarithm of how many each stands for, shape [compared].
    """

    places: Tensor
    nats: Tensor

    @staticmethod
    def draw(active: int, settings: HeadSettings, generator: torch.Generator) -> "Compared":
        """Take the first tokens and draw others, without repetition, all equally likely."""
        others = active - settings.always
        if settings.drawn is None or others <= settings.drawn:
            return Compared(torch.arange(active), torch.zeros(active))
        drawn = torch.randperm(others, generator=generator)[: settings.drawn]
        places = torch.cat([torch.arange(settings.always), settings.always + drawn])
        nats = torch.zeros(len(places))
        nats[settings.always :] = math.log(others / settings.drawn)
        return Compared(places, nats)


def _loss(
    training: "_Training",
    data: HeadData,
    rows: Tensor,
    batch: Tensor,
    compared: Compared,
    moments: tuple[Tensor, Tensor],
) -> Tensor:
    down, up, offset = training.weights
    rows, nats = rows[compared.places], compared.nats
    state = (data.hidden[batch].float() - moments[0]) / moments[1]
    shift = state @ down.T @ (rows @ up).T + rows @ offset
    with torch.no_grad():
        base, target = data.logits(batch, compared.places)
    return (kl_nats(target + nats, base + shift + nats) * data.weight[batch]).mean()


@final
class _Training:
    """Weights of a head, their AdamW and its one-cycle schedule."""

    def __init__(
        self, hidden: int, positions: int, settings: HeadSettings, generator: torch.Generator
    ) -> None:
        down = torch.randn(settings.rank, hidden, generator=generator) / hidden**0.5
        self.weights = [down, torch.zeros(hidden, settings.rank), torch.zeros(hidden)]
        self._optimiser = torch.optim.AdamW(
            [weight.requires_grad_() for weight in self.weights],
            settings.learning_rate,
            weight_decay=settings.weight_decay,
        )
        batches = -(-positions // settings.batch_positions)
        self._schedule = torch.optim.lr_scheduler.OneCycleLR(
            self._optimiser, settings.learning_rate, total_steps=settings.epochs * batches
        )

    def step(self, loss: Tensor) -> None:
        if not torch.isfinite(loss):
            raise NumericalError(
                "the head's loss is not a finite number",
                hint="lower --learning-rate, or record again if the recording has bad values",
            )
        self._optimiser.zero_grad()
        loss.backward()
        self._optimiser.step()
        self._schedule.step()

    def save(self, checkpoint: Checkpoint, steps: int) -> None:
        tensors: dict[str, Tensor] = {}
        for name, weight in zip(_NAMES, self.weights, strict=True):
            tensors[name] = weight.detach()
            tensors |= {f"{m}/{name}": self._optimiser.state[weight][m] for m in _MOMENTS}
        group = self._optimiser.param_groups[0]
        numbers = {
            "fit": checkpoint.fit,
            "steps": steps,
            "group": {name: group[name] for name in ("lr", "betas")},
        }
        with writing_atomically(checkpoint.path) as temp:
            save_file(tensors, temp, metadata={"state": json.dumps(numbers)})

    def load(self, checkpoint: Checkpoint) -> int:
        """Continue; how many steps are done: none without a state of this fit."""
        if not checkpoint.path.exists():
            return 0
        try:
            with safe_open(checkpoint.path, framework="pt") as file:
                numbers = json.loads(file.metadata()["state"])
                if numbers["fit"] != checkpoint.fit:
                    return 0
                tensors = {name: file.get_tensor(name) for name in file.keys()}
            self._restore(tensors, numbers)
            return int(numbers["steps"])
        except (SafetensorError, KeyError, ValueError, TypeError, RuntimeError) as error:
            raise InputError(
                f"the checkpoint {checkpoint.path} cannot be continued: {error}",
                hint=f"delete {checkpoint.path} to begin the fit again",
            ) from error

    def _restore(self, tensors: dict[str, Tensor], numbers: Mapping[str, Any]) -> None:
        steps = int(numbers["steps"])
        for name, weight in zip(_NAMES, self.weights, strict=True):
            with torch.no_grad():
                weight.copy_(tensors[name])
            self._optimiser.state[weight] = {
                "step": torch.tensor(float(steps)),
                **{m: tensors[f"{m}/{name}"] for m in _MOMENTS},
            }
        lr, betas = numbers["group"]["lr"], tuple(numbers["group"]["betas"])
        self._optimiser.param_groups[0].update(lr=lr, betas=betas)
        self._schedule.load_state_dict({"last_epoch": steps, "_step_count": steps + 1})
