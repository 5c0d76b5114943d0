"""Task figures by row, and their paired differences from the host. Pure."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from rich import box
from rich.table import Table

from trimtab.metrics import Estimate, draws
from trimtab.report.table import drawn_text
from trimtab.report.words import signed

Answers = Mapping[str, Any]
"""What a row answered, by task: `figures` and `samples`, as kept on disk."""


@dataclass(frozen=True)
class TaskFigure:
    """A metric of a task for one row.

    Attributes:
        task: Name of the task.
        metric: Name of lm-eval's metric.
        row: Name of the row.
        questions: How many were asked.
        value: The metric; its error is lm-eval's own, 0 where it has none.
        change: Paired difference from the host over the same questions, its error bootstrapped;
            None for the host, and for metrics that no single question has.
    """

    task: str
    metric: str
    row: str
    questions: int
    value: Estimate
    change: Estimate | None


@dataclass(frozen=True)
class TaskReport:
    """All figures.

    Attributes:
        figures: By task, metric and row.
    """

    figures: tuple[TaskFigure, ...]

    def as_json(self) -> dict[str, Any]:
        """The figures for tasks.json."""
        return {"schema": 1, "figures": [asdict(figure) for figure in self.figures]}

    def table(self) -> str:
        """One line a row, for a terminal."""
        drawn = Table(box=box.SIMPLE_HEAD, title="tasks (lm-evaluation-harness)")
        drawn.title_justify = "left"
        for name in ("task", "metric", "row"):
            drawn.add_column(name, no_wrap=True)
        for name in ("questions", "value", "against host"):
            drawn.add_column(name, justify="right", no_wrap=True)
        for figure in self.figures:
            value = f"{figure.value.mean:.4f} ± {figure.value.stderr:.4f}"
            drawn.add_row(
                figure.task, figure.metric, figure.row, str(figure.questions), value,
                _change(figure.change),
            )  # fmt: skip
        return drawn_text(drawn)


def report_of(answers: Mapping[str, Answers], *, seed: int) -> TaskReport:
    """Put the rows' answers together.

    Args:
        answers: By row, `host` among them.
        seed: Of the bootstrap.
    """
    figures = []
    for task, hosts in answers["host"].items():
        for name in sorted(hosts["figures"]):
            if "," not in name or "_stderr," in name:
                continue
            for row, found in answers.items():
                figures.append(_figure(task, name, row, found[task], hosts, seed))
    return TaskReport(tuple(figures))


def _figure(
    task: str, name: str, row: str, found: Answers, hosts: Answers, seed: int
) -> TaskFigure:
    metric, _, chosen = name.partition(",")
    figures = found["figures"]
    error = float(figures.get(f"{metric}_stderr,{chosen}", 0.0))
    ours, theirs = (_by_question(side["samples"], metric, chosen) for side in (found, hosts))
    change = None
    if row != "host" and ours and set(ours) == set(theirs):
        change = paired([ours[q] for q in ours], [theirs[q] for q in ours], seed=seed)
    questions = len({sample["doc_id"] for sample in found["samples"]})
    return TaskFigure(task, metric, row, questions, Estimate(figures[name], error), change)


def _by_question(samples: Sequence[Mapping[str, Any]], metric: str, chosen: str) -> dict[int, Any]:
    return {
        sample["doc_id"]: sample["metrics"][metric]
        for sample in samples
        if sample["filter"] == chosen and metric in sample["metrics"]
    }


def paired(ours: Sequence[float], theirs: Sequence[float], *, seed: int = 0) -> Estimate:
    """Mean difference ours - theirs over the same items, its error by bootstrap over them."""
    differences = np.array(ours, float) - np.array(theirs, float)
    drawn = draws(len(differences), seed)
    return Estimate(float(differences.mean()), float(differences[drawn].mean(1).std()))


def _change(change: Estimate | None) -> str:
    return "" if change is None else f"{signed(change.mean, 4)} ± {change.stderr:.4f}"
