"""Which learning rate suits a model and its text: short trainings, judged by held-out text.

The best rate follows from model and text together, and one that is three times too high can cost an
expert a quarter of what it gains (docs/tune.md). So none is right for all; the held-out text tells.
"""

import math
from collections.abc import Callable
from dataclasses import replace

import torch

from trimtab.errors import NumericalError
from trimtab.store.expert import CHECKPOINT_NAME, Trial, UnfinishedRun, write_run
from trimtab.tuning.job import Job
from trimtab.tuning.schedule import Schedule

RATES = (1e-3, 3e-4, 1e-4)
"""Peaks that a LoRA may have, from the highest down."""

TRIAL_TOKENS = 8_192
"""Tokens of a trial at most: a third of a training of 25 thousand."""

TRIAL_SHARE = 3
"""A trial takes at most one part in so many of an epoch's windows."""

MIN_TRIAL_STEPS = 8
"""Shorter trials say more of luck than of rates; where steps are long, one may take more tokens."""


Attempt = Callable[[float], Trial]
"""Trains at a rate for a short while."""


def trial_of(schedule: Schedule, window_tokens: int) -> Schedule | None:
    """The schedule of one trial, whatever its rate: the training's beginning, with its own end.

    A whole cycle down to a rate of nothing, since a high rate that has not come down yet looks
    worse than it is. None where there is too little text, or none held out.

    Args:
        schedule: Of the training itself.
        window_tokens: Tokens in a window.
    """
    least = MIN_TRIAL_STEPS * schedule.batch_windows
    most = max(TRIAL_TOKENS // window_tokens, least)
    windows = min(most, schedule.windows_per_epoch // TRIAL_SHARE)
    if not schedule.validations or windows < least:
        return None
    return replace(schedule, windows_per_epoch=windows, epochs=1, validations=1)


def most_trial_tokens(train_tokens: float) -> float:
    """How many tokens all trials of a training take at most, where its steps are not long.

    Args:
        train_tokens: Tokens of an epoch of it.
    """
    return len(RATES) * min(TRIAL_TOKENS, train_tokens / TRIAL_SHARE)


def chosen_rate(tried: tuple[Trial, ...], attempt: Attempt) -> float:
    """Try rates from the highest down until the held-out text gets dearer; the best of them.

    A rate at which training fails says nothing of the next one.

    Args:
        tried: Trials that an interrupted run has done already, from the highest rate down.
        attempt: Tries a rate.
    """
    trials = list(tried)
    for rate in RATES[len(tried) :]:
        if len(trials) > 1 and trials[-2].cost() <= trials[-1].cost() < math.inf:
            break
        trials.append(attempt(rate))
    return min(trials, key=Trial.cost).learning_rate


def learning_rate(run: UnfinishedRun, job: Job) -> tuple[float, tuple[Trial, ...]]:
    """The peak that is asked for or usual, or the best of some that are tried; and the trials.

    The model's weights are afterwards what they were.

    Args:
        run: The run; what it has tried is written into its folder after each trial.
        job: Its model and text.
    """
    config = run.config
    usual = config.usual_learning_rate
    short = trial_of(job.schedule(usual), config.window_tokens)
    if config.learning_rate is not None or short is None:
        return usual, ()
    # Not a learner's, which would hold a copy of the base's weights beside that of the trial's own.
    parameters = [one for one in job.model.model.parameters() if one.requires_grad]
    weights = [parameter.detach().clone() for parameter in parameters]
    trials = list(run.trials)

    def attempt(rate: float) -> Trial:
        checkpoint = f"{CHECKPOINT_NAME}/trial-{rate:g}.safetensors"
        label = f"trying a learning rate of {rate:g}"
        try:
            state = job.trained(replace(short, peak=rate), checkpoint, label)
            nats, tokens = state.held_out_nats[-1], state.train_tokens
        except NumericalError:
            nats, tokens = None, 0
        with torch.no_grad():
            for parameter, weight in zip(parameters, weights, strict=True):
                parameter.copy_(weight)
        trials.append(Trial(learning_rate=rate, tokens=tokens, nats_per_token=nats))
        write_run(config.out, run.model_copy(update={"trials": tuple(trials)}))
        (config.out / checkpoint).unlink(missing_ok=True)
        return trials[-1]

    return chosen_rate(run.trials, attempt), tuple(trials)
