"""A training of a model on its windows, with whatever schedule: tune's own, and its trials."""

from dataclasses import dataclass
from functools import partial

from trimtab.backends.hf import HFModel
from trimtab.backends.open import resolve_dtype
from trimtab.config import TuneConfig
from trimtab.losses import Loss, entropy_adaptive_nats, masked_cross_entropy_nats
from trimtab.text.packing import Windows
from trimtab.tuning.schedule import Schedule
from trimtab.tuning.training import Checkpoints, Learner, TrainingState, train
from trimtab.types import Progress


@dataclass(frozen=True)
class Job:
    """A model, what it learns, and what judges it.

    Attributes:
        config: How it is trained; checkpoints lie in its folder.
        model: The model, with the weights that are trained requiring gradients.
        windows: Its training text.
        held_out: What every validation scores; None trains without.
        progress: Shows each training.
    """

    config: TuneConfig
    model: HFModel
    windows: Windows
    held_out: Windows | None
    progress: Progress

    def learner(self) -> Learner:
        """The model's trained weights with moments of nothing."""
        arithmetic = resolve_dtype(self.config.dtype, self.model.device.type)
        vocab = len(self.model.unembedding.weight)
        return Learner(
            self.model.model, vocab=vocab, arithmetic=arithmetic, loss=_loss(self.config)
        )

    def schedule(self, peak: float) -> Schedule:
        """All of the training at a learning rate."""
        config, limit = self.config, len(self.windows)
        if config.max_tokens is not None:
            limit = min(limit, max(1, config.max_tokens // config.window_tokens))
        return Schedule(
            windows=len(self.windows),
            windows_per_epoch=limit,
            batch_windows=config.batch_windows,
            epochs=config.epochs,
            validations=0 if self.held_out is None else config.validations,
            peak=peak,
            patience=config.patience,
            seed=config.seed,
        )

    def trained(self, schedule: Schedule, checkpoint: str, label: str) -> TrainingState:
        """Train, or go on from a checkpoint of that name in the expert's folder.

        Args:
            schedule: Steps and learning rates.
            checkpoint: Where it is saved, relative to the folder.
            label: What the progress is called.

        Raises:
            NumericalError: A loss is not a finite number.
        """
        config = self.config
        checkpoints = Checkpoints(config.out / checkpoint, config.checkpoint_every_sec)
        label += ", going on (tokens)" if checkpoints.path.exists() else " (tokens)"
        total = schedule.epochs * schedule.windows_per_epoch * config.window_tokens
        with self.progress(label, total) as advance:
            return train(
                self.learner(),
                self.windows,
                self.held_out,
                schedule,
                checkpoints=checkpoints,
                advance=lambda done: advance(done * config.window_tokens),
            )


def _loss(config: TuneConfig) -> Loss:
    if config.loss == "eaft":
        return partial(entropy_adaptive_nats, alpha=config.eaft_alpha)
    return masked_cross_entropy_nats
