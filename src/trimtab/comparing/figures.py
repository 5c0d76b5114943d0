"""Figures of all methods with their errors, and which of them is better than which. Pure."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from trimtab.comparing.questions import METRICS, Task, metric, scores
from trimtab.comparing.values import MethodResult, TextScore
from trimtab.metrics import (
    DocumentScore,
    Estimate,
    bits_per_byte,
    bootstrap,
    draws,
    paired_difference,
    pool_kinds,
    resampled_bits,
)

BASELINE = "zero-shot"
"""All others are compared with it, and it is always measured."""

GENERAL = "general text"
"""All kinds of it, pooled."""

SURE = 0.95
"""Share of resamples in which one method must be ahead to be called better."""

ENOUGH = 5
"""Documents or questions that have to tell two methods apart before one is called surely better:
that all of fewer speak for the same one of two equal methods happens in more than 5 % of draws
(0.5 to their number), whatever their resamples say."""


@dataclass(frozen=True)
class MethodFigures:
    """A method in numbers.

    Attributes:
        result: What was measured.
        domain: Domain text, bits per byte; None where it was not measured.
        domain_change: Paired difference from the bare host.
        general: General text, pooled over its kinds.
        general_change: Paired difference from the bare host.
        task: Metrics of the task by name, each in [0, 1].
        task_change: Paired differences from the bare host.
    """

    result: MethodResult
    domain: Estimate | None
    domain_change: Estimate | None
    general: Estimate | None
    general_change: Estimate | None
    task: Mapping[str, Estimate]
    task_change: Mapping[str, Estimate]

    @property
    def name(self) -> str:
        """The method's name."""
        return self.result.method


def figures_of(
    results: Sequence[MethodResult], task: Task | None, *, seed: int
) -> list[MethodFigures]:
    """Put figures and errors to results.

    Errors are bootstrapped over documents and over questions; differences from the bare host
    resample both sides together.

    Args:
        results: All methods, the baseline among them.
        task: The questions that were asked, if any.
        seed: Of the bootstrap.
    """
    bare = next(result for result in results if result.method == BASELINE)
    return [_figures(result, bare, task, seed) for result in results]


def _figures(
    result: MethodResult, bare: MethodResult, task: Task | None, seed: int
) -> MethodFigures:
    ours, theirs = _scores(result.domain), _scores(bare.domain)
    changed = bool(ours) and result is not bare
    kinds = {kind: (_scores(s), _scores(bare.general[kind])) for kind, s in result.general.items()}
    estimates = [bootstrap(found, seed=seed) for found, _ in kinds.values()]
    changes = [paired_difference(*pair, seed=seed) for pair in kinds.values()]
    values, differences = _task_figures(result, bare, task, seed)
    return MethodFigures(
        result,
        bootstrap(ours, seed=seed) if ours else None,
        paired_difference(ours, theirs, seed=seed) if changed else None,
        pool_kinds(estimates) if estimates else None,
        pool_kinds(changes) if changes and changed else None,
        values,
        differences if result is not bare else {},
    )


def _task_figures(
    result: MethodResult, bare: MethodResult, task: Task | None, seed: int
) -> tuple[dict[str, Estimate], dict[str, Estimate]]:
    if task is None or not result.answers:
        return {}, {}
    drawn, whole = draws(len(task.questions), seed), np.arange(len(task.questions))[None]
    values, differences = {}, {}
    for name in METRICS[task.kind]:
        ours, theirs = (metric(name, task, side.answers, drawn) for side in (result, bare))
        found, before = (
            float(metric(name, task, side.answers, whole)[0]) for side in (result, bare)
        )
        values[name] = Estimate(found, float(ours.std()))
        differences[name] = Estimate(found - before, float((ours - theirs).std()))
    return values, differences


def _scores(texts: Sequence[TextScore]) -> list[DocumentScore]:
    return [DocumentScore(text.nats, text.bytes) for text in texts]


def quality(rows: Sequence[MethodFigures]) -> str:
    """What methods are ranked by: the task's first metric where there is one, else the text."""
    return next((name for row in rows for name in row.task), "bits per byte")


def quality_of(row: MethodFigures, by: str) -> Estimate | None:
    """A method's quality; None where it was not measured."""
    return row.domain if by == "bits per byte" else row.task.get(by)


def advantage(by: str) -> float:
    """1 where more is better, -1 where less is."""
    return -1.0 if by == "bits per byte" else 1.0


def ranked(rows: Sequence[MethodFigures], by: str) -> list[MethodFigures]:
    """Measured methods, the best first.

    Even ones follow each other by a task's further figures, and then by their time before use.
    """
    found = [(row, value) for row in rows if (value := quality_of(row, by)) is not None]

    def place(pair: tuple[MethodFigures, Estimate]) -> tuple[float, tuple[float, ...], float]:
        row, value = pair
        further = tuple(-advantage(name) * one.mean for name, one in row.task.items() if name != by)
        return -advantage(by) * value.mean, further, row.result.sec

    return [row for row, _ in sorted(found, key=place)]


def drawn_from(row: MethodFigures, by: str) -> int:
    """How many documents, or questions, a figure is resampled from; one alone tells no error.

    Of general text the kind with the fewest documents counts.
    """
    if by == GENERAL:
        return min(map(len, row.result.general.values()), default=0)
    return len(row.result.domain if by == "bits per byte" else row.result.answers)


def share_ahead(
    ours: MethodFigures, theirs: MethodFigures, by: str, task: Task | None, *, seed: int = 0
) -> float:
    """Share of paired resamples in which the first method is ahead of the second.

    Documents, or questions, are resampled for both together; a tie counts a half. 0.5 says that
    nothing is known, as of a single document, which resampled is always itself; 1 that no
    resample speaks against it.
    """
    if drawn_from(ours, by) < 2:
        return 0.5
    if by == "bits per byte":
        pair = [_scores(row.result.domain) for row in (ours, theirs)]
        drawn = draws(len(pair[0]), seed)
        first, second = (resampled_bits(scores, drawn) for scores in pair)
    else:
        assert task is not None
        drawn = draws(len(task.questions), seed)
        first, second = (metric(by, task, row.result.answers, drawn) for row in (ours, theirs))
    ahead = advantage(by) * (first - second)
    return float((ahead > 0).mean() + 0.5 * (ahead == 0).mean())


def surely_ahead(
    ours: MethodFigures, theirs: MethodFigures, by: str, task: Task | None, *, seed: int = 0
) -> bool:
    """Whether the first method is ahead in SURE of all resamples, of ENOUGH that tell them apart.

    A question that both answer rightly, or both wrongly, tells nothing.
    """
    if by == "bits per byte":
        sides = [[text.nats for text in row.result.domain] for row in (ours, theirs)]
    else:
        assert task is not None
        sides = [scores(task, row.result.answers) for row in (ours, theirs)]
    telling = sum(first != second for first, second in zip(*sides, strict=True))
    return telling >= ENOUGH and share_ahead(ours, theirs, by, task, seed=seed) >= SURE


def pareto(
    rows: Sequence[MethodFigures], by: str, cost: Callable[[MethodFigures], float]
) -> set[str]:
    """Methods that no other beats in quality at no greater cost."""
    front, best = set(), -np.inf
    measured = ranked(rows, by)
    for row in sorted(measured, key=lambda row: (cost(row), measured.index(row))):
        value = quality_of(row, by)
        assert value is not None
        if advantage(by) * value.mean > best:
            front.add(row.name)
            best = advantage(by) * value.mean
    return front


def share_of_gain(row: MethodFigures, rival: MethodFigures, bare: MethodFigures) -> float | None:
    """How much of the rival's gain on domain text a method reaches; None without such a gain."""
    sides = [_scores(side.result.domain) for side in (row, rival, bare)]
    if not all(sides):
        return None
    ours, theirs, before = map(bits_per_byte, sides)
    return (before - ours) / (before - theirs) if before > theirs else None
