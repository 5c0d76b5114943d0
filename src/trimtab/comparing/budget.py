"""Time that a comparison may take, and what work is predicted to take of it."""

import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import final

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
        memory_bytes: Memory that a method may take.
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
    def left_sec(self) -> float:
        """Seconds that are left, at least 0."""
        return max(self.total_sec - (self.clock() - self._started), 0.0)

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

    def guard(self, work: str) -> Callable[[float], None]:
        """Watch a piece of work: told which share of it is done, it ends what takes too long."""
        started = self.clock()

        def told(share: float) -> None:
            took = self.clock() - started
            self.ask_for(f"the rest of {work}", took / max(share, 1e-9) * (1 - share))

        return told

    def ask_for_memory(self, work: str, needed: float) -> None:
        """Go on only if there is so much memory.

        Raises:
            NotRun: There is not.
        """
        if needed > self.memory_bytes:
            raise NotRun(
                f"{work} would take about {needed / 1e9:.1f} GB of memory, and"
                f" {self.memory_bytes / 1e9:.1f} GB are free"
            )


def _spoken(sec: float) -> str:
    return f"{sec:.0f} s" if sec < 120 else f"{sec / 60:.0f} min"
