"""Clocks, and figures with their spread."""

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from typing import final

import torch

from trimtab.types import Advance


@dataclass(frozen=True)
class Figure:
    """A figure that was measured several times.

    Attributes:
        value: The median.
        low: The lowest.
        high: The highest.
    """

    value: float
    low: float
    high: float

    @staticmethod
    def of(samples: Sequence[float]) -> "Figure":
        """Median and spread of at least one sample."""
        return Figure(statistics.median(samples), min(samples), max(samples))

    def over(self, other: "Figure") -> "Figure":
        """A quotient of two figures that were not measured in pairs: its bounds are the widest."""
        return Figure(self.value / other.value, self.low / other.high, self.high / other.low)

    def plus(self, other: "Figure") -> "Figure":
        """A sum, with the widest bounds."""
        return Figure(self.value + other.value, self.low + other.low, self.high + other.high)

    def times(self, factor: float) -> "Figure":
        """So many times a figure."""
        return Figure(self.value * factor, self.low * factor, self.high * factor)


@final
class Clock:
    """Hears when tokens come, as transformers' streamers do; the first call is the prompt."""

    def __init__(self) -> None:
        """Start with the call of `generate`."""
        self._began_sec = time.perf_counter()
        self._heard: list[tuple[float, int]] = []

    def put(self, value: torch.Tensor) -> None:
        """Note when so many tokens came."""
        self._heard.append((time.perf_counter(), value.numel()))

    def end(self) -> None:
        """Nothing is held back."""

    @property
    def has_begun(self) -> bool:
        """The first tokens have come."""
        return len(self._heard) > 1

    @property
    def first_sec(self) -> float:
        """Seconds to the first tokens: the reading of the prompt, and what it says as evidence."""
        return self._heard[1][0] - self._began_sec

    @property
    def sec(self) -> float:
        """Seconds from the first tokens to the last; from the start, where all came at once."""
        first_sec = self._heard[1][0] if len(self._heard) > 2 else self._began_sec
        return self._heard[-1][0] - first_sec

    @property
    def tokens(self) -> int:
        """Tokens that came in these seconds: all but the first, whose price is the prompt's."""
        return sum(tokens for _, tokens in self._heard[2:]) or self._heard[1][1]


@dataclass
class Stopwatch:
    """A `trimtab.types.Progress` that notes when each piece of work began, went on and ended.

    Attributes:
        marks_sec: By label: the begin, each call of advance, and the end.
    """

    marks_sec: dict[str, list[float]] = field(default_factory=dict)

    @contextmanager
    def progress(self, label: str, total: int) -> Iterator[Advance]:
        """Note the times of one piece of work."""
        del total
        marks = self.marks_sec[label] = [time.perf_counter()]
        try:
            yield lambda _: marks.append(time.perf_counter())
        finally:
            marks.append(time.perf_counter())

    def sec(self, label: str) -> float:
        """How long a piece of work took; 0 where there was none."""
        marks = self.marks_sec.get(label, [0.0])
        return marks[-1] - marks[0]

    def steps_sec(self, label: str) -> list[float]:
        """How long each part of it took, from one call of advance to the next, but the first."""
        marks = self.marks_sec[label][1:-1]
        return [after - before for before, after in pairwise(marks)]


def timed(work: Callable[[], object]) -> float:
    """Seconds of a call, and of all that it has asked a GPU to do."""
    began_sec = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - began_sec
