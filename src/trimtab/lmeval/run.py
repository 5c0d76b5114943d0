"""Tasks asked of every row, with what each answer cost kept on disk."""

import json
import logging
import os
import random
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from jinja2 import StrictUndefined
from jinja2.sandbox import ImmutableSandboxedEnvironment
from lm_eval import evaluator as harness
from lm_eval import utils as harness_utils
from lm_eval.api import task as harness_task
from lm_eval.tasks import TaskManager

from trimtab.lmeval.rows import Models
from trimtab.lmeval.tasks import LocalTask
from trimtab.lmeval.values import Answers, TaskReport, report_of
from trimtab.store.files import read_json, sha256_bytes, write_json
from trimtab.types import Progress

FOLDER = "tasks"
SCHEMA = 1
"""Version of the files in that folder."""

_KEPT = ("doc_id", "target", "filtered_resps", "filter")
_RESAMPLES = 1_000


@dataclass(frozen=True)
class Asked:
    """What is asked.

    Attributes:
        tasks: The tasks.
        rows: Rows of the report, `host` first.
        folder: The evaluation's folder.
        limit: Questions of each task at most; None for all.
        seed: Of lm-eval's draws (examples in the prompt) and of the bootstrap.
        key: Names the models and how they are steered.
    """

    tasks: Sequence[LocalTask]
    rows: Sequence[str]
    folder: Path
    limit: int | None
    seed: int
    key: str

    def key_of(self, row: str) -> str:
        """Names all that decides a row's answers."""
        tasks = [task.sha256 for task in self.tasks]
        version = harness_version()
        value = [SCHEMA, version, self.key, row, tasks, self.limit, self.seed]
        return sha256_bytes(json.dumps(value).encode())[:32]


def harness_version() -> str:
    """Version of lm-evaluation-harness."""
    return metadata.version("lm_eval")


def run_tasks(asked: Asked, models: Models, progress: Progress) -> TaskReport:
    """Ask every row all tasks, and compare each with the host on the same questions.

    Each row's answers are kept in the folder `tasks` of the evaluation: what is there already is
    not asked again.

    Args:
        asked: What is asked.
        models: What the rows are made of.
        progress: Shows the requests.

    Raises:
        InputError: The adapter lacks a carrier that a row needs.
        StorageError: The folder cannot be written.
    """
    answers = {row: _answers(asked, row, models, progress) for row in asked.rows}
    return report_of(answers, seed=asked.seed)


def _answers(asked: Asked, row: str, models: Models, progress: Progress) -> Answers:
    path = asked.folder / FOLDER / f"{row}.json"
    key = asked.key_of(row)
    if path.is_file():
        kept = read_json(path, "answers of a row")
        if kept.get("key") == key:
            return kept["tasks"]
    with _quiet(), models.row(row, progress) as model:
        found = harness.simple_evaluate(
            model=model,
            tasks=[dict(task.config) for task in asked.tasks],
            # Without lm-eval's own tasks, whose files take seconds to index.
            task_manager=TaskManager(include_defaults=False),
            limit=asked.limit,
            bootstrap_iters=_RESAMPLES,
            random_seed=asked.seed,
            numpy_random_seed=asked.seed,
            torch_random_seed=asked.seed,
            fewshot_random_seed=asked.seed,
        )
    assert found is not None
    tasks = {task.name: _kept(found, task.name) for task in asked.tasks}
    write_json(path, {"schema": SCHEMA, "key": key, "row": row, "tasks": tasks})
    return tasks


def _kept(found: Mapping[str, Any], task: str) -> dict[str, Any]:
    """What lm-eval says of a task, and of each question."""
    figures = {
        name: value
        for name, value in found["results"][task].items()
        if isinstance(value, int | float) and value == value
    }
    samples = []
    for sample in found["samples"][task]:
        names = sample["metrics"]
        metrics = {n: sample[n] for n in names if isinstance(sample.get(n), int | float)}
        kept = {name: _plain(sample[name]) for name in _KEPT}
        samples.append({**kept, "metrics": {n: float(v) for n, v in metrics.items()}})
    return {"figures": figures, "samples": samples}


def _plain(value: Any) -> Any:
    """A value in JSON's words: lm-eval's answers are tuples of numbers and truths."""
    if isinstance(value, Mapping):
        return {str(name): _plain(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    return value if isinstance(value, str | int | float | bool | None) else str(value)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep lm-eval and datasets from writing on the terminal, and templates in a sandbox."""
    logger, bars = logging.getLogger("lm_eval"), datasets.is_progress_bar_enabled()
    level, plain, single = logger.level, harness_utils.env, os.environ.get("DISABLE_MULTIPROC")
    logger.setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    # It would ask git about the current folder, which answers on the terminal where it is no
    # repository; nothing of the answer is kept.
    asks_git, bar = harness.get_git_commit_hash, harness_task.tqdm
    harness.get_git_commit_hash = lambda: ""
    harness_task.tqdm = partial(bar, disable=True)
    os.environ["DISABLE_MULTIPROC"] = "1"
    harness_utils.env = _sandbox(plain.filters)
    # lm-eval seeds every generator of the process.
    drawn, drawn_numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        harness_utils.env = plain
        harness.get_git_commit_hash, harness_task.tqdm = asks_git, bar
        random.setstate(drawn)
        np.random.set_state(drawn_numpy)
        logger.setLevel(level)
        if bars:
            datasets.enable_progress_bars()
        if single is None:
            os.environ.pop("DISABLE_MULTIPROC", None)
        else:
            os.environ["DISABLE_MULTIPROC"] = single


def _sandbox(filters: Mapping[str, Any]) -> ImmutableSandboxedEnvironment:
    """Jinja for the templates of task files, which could else reach any Python object."""
    environment = ImmutableSandboxedEnvironment(
        undefined=StrictUndefined, keep_trailing_newline=True
    )
    environment.filters.update(filters)
    return environment
