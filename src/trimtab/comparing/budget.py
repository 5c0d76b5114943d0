"""Time that a comparison may take, and what work is predicted to take of it."""

import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import final

from trimtab.types import Advance, Progress

PACE_SEC = 5.0
"""A piece of work is judged by its pace after so many seconds of it."""

_UNITS = {"s": 1, "sec": 1, "min": 60, "h": 3600, "d": 86400}
_SPELLED = re.compile(r"\s*(\d+(?:\.\d+)?)\s*(s|sec|min|h|d)\s*")


def seconds_of(text: str) -> float:
    """Read a duration such as 90s, 20min, 2h or 1d.

    Raises:
        ValueError: It is no duration, or none at all.
    """
    found = _SPELLED.fullmatch(text)
    if not found or not float(found[1]):
        raise ValueError("a duration is a number with s, min, h or d, for example 20min")
    return float(found[1]) * _UNITS[found[2]]


@final
class NotRun(Exception):
    """A method cannot be run here, or not within the budget; its cost can be estimated."""

    def __init__(self, reason: str) -> None:
        """Say why, in words."""
        super().__init__(reason)
        self.reason = reason


@dataclass
class Budget:
    """What is left of the time, and how fast this machine has shown itself to be.

    Attributes:
        total_sec: Time for the whole comparison.
        memory_bytes: Memory that the process may have in all.
        reading: Operations a second of forward passes, as measured.
        training: Operations a second of training, as measured.
    """

    total_sec: float
    memory_bytes: float
    reading: float | None = None
    training: float | None = None
    clock: Callable[[], float] = field(default=time.monotonic, repr=False)

    def __post_init__(self) -> None:
        """Start the clock."""
        self._started = self.clock()

    @property
    def spent_sec(self) -> float:
        """Seconds since the beginning."""
        return self.clock() - self._started

    @property
    def left_sec(self) -> float:
        """Seconds that are left, at least 0."""
        return max(self.total_sec - self.spent_sec, 0.0)

    def training_sec(self, needed: float) -> float:
        """Seconds that training is predicted to take: by training if some was measured.

        Args:
            needed: Floating-point operations.
        """
        rate = self.training or self.reading
        return needed / rate if rate else 0.0

    def reading_sec(self, needed: float) -> float:
        """Seconds that forward passes are predicted to take."""
        return needed / self.reading if self.reading else 0.0

    def ask_for(self, work: str, sec: float) -> None:
        """Go on only if so many seconds are left.

        Raises:
            NotRun: They are not.
        """
        if sec > self.left_sec:
            raise NotRun(
                f"{work} would take about {_spoken(sec)}, and {_spoken(self.left_sec)} of the"
                " budget are left"
            )

    def guarded(self, progress: Progress, work: str) -> Progress:
        """A progress display that ends work which would take longer than what is left.

        Each piece of the work is judged by its own pace since the first units that it tells of,
        for these an interrupted piece may have done before; and none goes on without any time.

        Args:
            progress: Shows the work.
            work: What it is, for the reason that is given.

        Returns:
            A display whose opening and whose units raise NotRun.
        """

        @contextmanager
        def display(label: str, total: int) -> Iterator[Advance]:
            pace = _Pace(total)
            self._go_on(work, pace)
            with progress(label, total) as advance:

                def told(units: int) -> None:
                    advance(units)
                    pace.tell(units, self.clock())
                    self._go_on(work, pace)

                yield told

        return display

    def _go_on(self, work: str, pace: "_Pace") -> None:
        if pace.is_done:
            return
        self.ask_for(f"the rest of {work}", pace.rest_sec)
        if not self.left_sec:
            raise NotRun(f"no time of the budget is left for the rest of {work}")

    def ask_for_memory(self, work: str, needed: float) -> None:
        """Go on only if the process may have so much memory in all.

        Raises:
            NotRun: There is not.
        """
        if needed > self.memory_bytes:
            raise NotRun(
                f"{work} would take the process to about {needed / 1e9:.1f} GB of memory, and it"
                f" may have {self.memory_bytes / 1e9:.1f} GB"
            )


@dataclass
class _Pace:
    """How fast a piece of work goes.

    Attributes:
        total: Units of it; 0 if that is not known.
    """

    total: int
    done: int = 0
    _first: int | None = None
    _began: float = 0.0
    _took: float = 0.0

    def tell(self, units: int, now: float) -> None:
        """So many more units are done."""
        self.done += units
        if self._first is None:
            self._first, self._began = self.done, now
        self._took = now - self._began

    @property
    def is_done(self) -> bool:
        """Whether nothing of it is left."""
        return 0 < self.total <= self.done

    @property
    def rest_sec(self) -> float:
        """Seconds that the rest is predicted to take; 0 where nothing can be said yet."""
        since = self.done - (self._first or 0)
        if self._took < PACE_SEC or since <= 0 or not self.total:
            return 0.0
        return self._took / since * (self.total - self.done)


def _spoken(sec: float) -> str:
    return f"{sec:.0f} s" if sec < 120 else f"{sec / 60:.0f} min"
