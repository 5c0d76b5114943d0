"""Training a model on windows: the schedule, the steps, and checkpoints that resume exactly."""

import json
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, final

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from trimtab.errors import InputError, NumericalError
from trimtab.losses import Loss, masked_cross_entropy_nats
from trimtab.store.files import writing_atomically
from trimtab.text.packing import Windows
from trimtab.tuning.lora_path import LoraPaths
from trimtab.tuning.schedule import Schedule, one_cycle, step_seed
from trimtab.types import Advance

# Logits that are held in float32 at once (256 MiB); a batch beyond that is run in parts.
_LOGIT_ELEMENTS = 2**26
_CLIP_NORM = 1.0
_LOWER = "tune into a new folder with a lower --learning-rate, or with --dtype float32"


@dataclass
class TrainingState:
    """How far a run is, apart from weights and moments.

    Attributes:
        step: Steps done.
        train_tokens: Tokens that the loss counted, over all steps.
        held_out_nats: Cross entropy of each validation, nats per token; the first is before
            training.
        best: Weights of the best validation, in the order of the learner's parameters.
    """

    step: int = 0
    train_tokens: int = 0
    held_out_nats: list[float] = field(default_factory=list)
    best: list[Tensor] = field(default_factory=list)

    def stale(self) -> int:
        """Validations since the best one."""
        losses = self.held_out_nats
        return len(losses) - 1 - losses.index(min(losses)) if losses else 0


@final
class Learner:
    """A model in training: its trainable weights, their AdamW, and the arithmetic."""

    def __init__(
        self,
        model: nn.Module,
        *,
        vocab: int,
        arithmetic: torch.dtype,
        loss: Loss = masked_cross_entropy_nats,
    ) -> None:
        """Take the model's weights that require gradients; all are kept in float32.

        Args:
            model: A causal transformers model.
            vocab: Number of its logits.
            arithmetic: float32, or bfloat16 for mixed precision over the float32 weights.
            loss: What steps minimise; validations are cross entropy whatever it is, so that they
                can be compared.
        """
        self._model = model
        self._loss = loss
        self._vocab = vocab
        self._arithmetic = arithmetic
        self._paths = LoraPaths(model, arithmetic)
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        self._names = [name for name, _ in named]
        self.parameters = [parameter for _, parameter in named]
        # Over weights and moments in one pass, which takes a third of the time.
        self._optimiser = torch.optim.AdamW(self.parameters, weight_decay=0.01, fused=True)
        self.begun_steps = 0
        """Steps that have changed the weights, or have begun to."""

    @property
    def device(self) -> torch.device:
        """Where the trained weights are."""
        return self.parameters[0].device

    def step(self, windows: Windows, learning_rate: float, *, seed: int) -> float:
        """Take one optimiser step.

        Args:
            windows: The batch, with at least one counted token.
            learning_rate: Step size.
            seed: Seed of dropout.

        Returns:
            The batch's loss before the step, nats per counted token; may be not finite, and
            then the weights are as they were.
        """
        torch.manual_seed(seed)
        self._model.train()
        tokens = int(windows.counted.sum())
        loss = 0.0
        for part in self._parts(windows):
            part_loss = self._nats(part, self._loss) / tokens
            part_loss.backward()
            loss += part_loss.item()
        norm = nn.utils.clip_grad_norm_(self.parameters, _CLIP_NORM)
        if math.isfinite(loss) and math.isfinite(norm.item()):
            self._optimiser.param_groups[0]["lr"] = learning_rate
            self.begun_steps += 1
            self._optimiser.step()
        else:
            loss = math.nan
        self._optimiser.zero_grad()
        return loss

    @torch.no_grad()
    def nats_per_token(self, windows: Windows, *, batch_windows: int) -> float:
        """Score windows without training: cross entropy, nats per counted token."""
        self._model.eval()
        parts = (windows.rows(slice(n, n + batch_windows)) for n in _steps(windows, batch_windows))
        loss = masked_cross_entropy_nats
        nats = [self._nats(p, loss).item() for batch in parts for p in self._parts(batch)]
        return math.fsum(nats) / int(windows.counted.sum())

    def weights(self) -> list[Tensor]:
        """Copies of the trained weights."""
        return [parameter.detach().clone() for parameter in self.parameters]

    @torch.no_grad()
    def set_weights(self, weights: Sequence[Tensor]) -> None:
        """Put weights, such as `weights` gave, into the model."""
        for parameter, weight in zip(self.parameters, weights, strict=True):
            parameter.copy_(weight)

    def save(self, path: Path, state: TrainingState) -> None:
        """Write a checkpoint from which `load` continues bit for bit, atomically.

        Raises:
            StorageError: The disk is full or the path cannot be written.
        """
        tensors: dict[str, Tensor] = {}
        for name, parameter in zip(self._names, self.parameters, strict=True):
            tensors[f"weight/{name}"] = parameter.detach()
            # A weight that no gradient has reached has no moments.
            if moments := self._optimiser.state.get(parameter):
                tensors[f"mean/{name}"] = moments["exp_avg"]
                tensors[f"square/{name}"] = moments["exp_avg_sq"]
        tensors |= {f"best/{name}": t for name, t in zip(self._names, state.best, strict=False)}
        numbers = {
            "step": state.step,
            "train_tokens": state.train_tokens,
            "held_out_nats": state.held_out_nats,
        }
        contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
        with writing_atomically(path) as temp:
            save_file(contiguous, temp, metadata={"state": json.dumps(numbers)})

    def load(self, path: Path) -> TrainingState:
        """Continue from a checkpoint.

        Raises:
            InputError: The checkpoint is broken or belongs to another model.
        """
        try:
            with safe_open(path, framework="pt") as file:
                numbers = json.loads(file.metadata()["state"])
                return self._restore(file, numbers)
        except (SafetensorError, KeyError, ValueError, RuntimeError) as error:
            raise InputError(
                f"the checkpoint {path} cannot be continued: {error}",
                hint=f"delete {path} to begin the training again",
            ) from error

    def _restore(self, file: Any, numbers: dict[str, Any]) -> TrainingState:
        self.set_weights([file.get_tensor(f"weight/{name}") for name in self._names])
        stored = set(file.keys())
        for name, parameter in zip(self._names, self.parameters, strict=True):
            if f"mean/{name}" not in stored:
                continue
            self._optimiser.state[parameter] = {
                "step": torch.tensor(float(numbers["step"]), device=parameter.device),
                "exp_avg": _like(parameter, file.get_tensor(f"mean/{name}")),
                "exp_avg_sq": _like(parameter, file.get_tensor(f"square/{name}")),
            }
        self.begun_steps = int(numbers["step"])
        best = (
            [file.get_tensor(f"best/{n}") for n in self._names] if numbers["held_out_nats"] else []
        )
        return TrainingState(**numbers, best=[tensor.to(self.device) for tensor in best])

    def _nats(self, windows: Windows, loss: Loss) -> Tensor:
        windows = windows.to(self.device)
        with self._mixed_precision(), self._paths.used():
            logits = self._model(
                input_ids=windows.token_ids, position_ids=windows.position_ids, use_cache=False
            ).logits
        # The last position counts for nothing: cutting it off would copy all logits, and their
        # gradients once more.
        targets = windows.token_ids.roll(-1, dims=1)
        counted = windows.counted.roll(-1, dims=1)
        counted[:, -1] = False
        return loss(logits, targets, counted)

    def _mixed_precision(self) -> AbstractContextManager[object]:
        mixed = self._arithmetic is not torch.float32
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=mixed)

    def _parts(self, windows: Windows) -> list[Windows]:
        size = max(1, _LOGIT_ELEMENTS // (windows.token_ids.shape[1] * self._vocab))
        return [windows.rows(slice(n, n + size)) for n in _steps(windows, size)]


def _like(parameter: Tensor, values: Tensor) -> Tensor:
    """Values laid out as a parameter is, which an optimiser's one pass takes for granted."""
    return torch.empty_like(parameter).copy_(values)


def _steps(windows: Windows, size: int) -> range:
    return range(0, len(windows), size)


@dataclass(frozen=True)
class Checkpoints:
    """Where and how often a run is saved."""

    path: Path
    every_sec: float


def train(
    learner: Learner,
    windows: Windows,
    held_out: Windows | None,
    schedule: Schedule,
    *,
    checkpoints: Checkpoints,
    advance: Advance,
) -> TrainingState:
    """Train until the schedule ends or the held-out loss stops falling; keep the best weights.

    Continues from the checkpoint if there is one, bit for bit as if it had never stopped (on
    the same processor with the same number of threads). Torch's global random state is left as
    it was. The base counts as a candidate: where no training helps, the best weights are its
    own.

    Args:
        learner: The model; afterwards it holds the best weights.
        windows: Training windows.
        held_out: Windows of the held-out text; None trains to the end of the schedule.
        schedule: Steps, their windows and learning rates.
        checkpoints: Where and how often to save.
        advance: Told the number of windows done.

    Returns:
        The final state.

    Raises:
        NumericalError: A loss is not a finite number; the last checkpoint stays.
        InputError: The checkpoint cannot be continued.
        StorageError: A checkpoint cannot be written.
    """
    devices = [learner.device] if learner.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        if checkpoints.path.exists():
            state = learner.load(checkpoints.path)
            advance(sum(len(schedule.rows(step)) for step in range(state.step)))
        else:
            state = TrainingState()
            _validate(learner, held_out, schedule, state)
        saved = time.monotonic()
        while state.step < schedule.steps and state.stale() < schedule.patience:
            with _saved_if_stopped(learner, checkpoints, state):
                done = _one_step(learner, windows, schedule, state)
            advance(done)
            if schedule.validates_after(state.step):
                _validate(learner, held_out, schedule, state)
            if time.monotonic() - saved >= checkpoints.every_sec:
                learner.save(checkpoints.path, state)
                saved = time.monotonic()
    if state.best:
        learner.set_weights(state.best)
    return state


@contextmanager
def _saved_if_stopped(
    learner: Learner, checkpoints: Checkpoints, state: TrainingState
) -> Iterator[None]:
    """Save a run that Ctrl-C ends within a step, as it was before that step."""
    try:
        yield
    except KeyboardInterrupt:
        # Most of a step changes nothing. Once weights are changed, what was saved before counts.
        if learner.begun_steps == state.step:
            learner.save(checkpoints.path, state)
        raise


def _one_step(learner: Learner, windows: Windows, schedule: Schedule, state: TrainingState) -> int:
    batch = windows.rows(schedule.rows(state.step))
    rate = one_cycle(state.step, schedule.steps, schedule.peak)
    loss = learner.step(batch, rate, seed=step_seed(schedule.seed, state.step))
    if not math.isfinite(loss):
        raise NumericalError(
            f"the loss or its gradient is not a finite number at step {state.step + 1} of"
            f" {schedule.steps}, at learning rate {rate:.3g}",
            hint=_LOWER,
        )
    state.step += 1
    state.train_tokens += int(batch.counted.sum())
    return len(batch)


def _validate(
    learner: Learner, held_out: Windows | None, schedule: Schedule, state: TrainingState
) -> None:
    if held_out is None:
        return
    loss = learner.nats_per_token(held_out, batch_windows=schedule.batch_windows)
    if not math.isfinite(loss):
        raise NumericalError(
            f"the loss of the held-out text is {loss} after step {state.step} of {schedule.steps}",
            hint=_LOWER if state.step else "the model's own weights are broken; use another copy",
        )
    if not state.held_out_nats or loss < min(state.held_out_nats):
        state.best = learner.weights()
    state.held_out_nats.append(loss)
