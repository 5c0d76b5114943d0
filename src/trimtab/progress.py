"""Progress on the terminal: bars with an estimate of what is left, or sparse lines in a log."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import final

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    Task,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from trimtab.types import Advance

LINE_EVERY_SEC = 15.0
"""A log that is no terminal gets a line this often."""

RESTORED_SEC = 1.0
"""Units that are told together with the first ones may be of an earlier run, which says nothing of
the pace."""


@final
class Display:
    """Shows work in progress on standard error; `progress` is a `trimtab.types.Progress`."""

    def __init__(
        self, console: Console | None = None, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """Prepare a display that shows nothing yet.

        Args:
            console: Where to show (default: standard error).
            clock: Seconds; for tests.
        """
        self._console = console or Console(stderr=True)
        self._clock = clock
        self._bars: Progress | None = None
        self._open_tasks: list[TaskID] = []
        self._hushed = False

    @contextmanager
    def progress(self, label: str, total: int) -> Iterator[Advance]:
        """Show one piece of work; pieces may lie inside each other.

        Args:
            label: What is done.
            total: Units in all; 0 if that is not known.
        """
        if self._hushed:
            yield lambda _: None
        elif self._console.is_terminal:
            with self._bar(label, total) as advance:
                yield advance
        else:
            with self._lines(label, total) as advance:
                yield advance

    @contextmanager
    def waiting(self, label: str) -> Iterator[None]:
        """Show on a terminal, and nowhere else, what is waited for; nothing of it stays.

        Args:
            label: What happens meanwhile.
        """
        if not self._console.is_terminal:
            yield
            return
        # Programs that are loaded meanwhile keep the streams that they find.
        with Progress(
            SpinnerColumn(),
            TextColumn("{task.description}", markup=False),
            console=self._console,
            transient=True,
            redirect_stdout=False,
            redirect_stderr=False,
        ) as shown:
            shown.add_task(label, total=None)
            yield

    def hush(self) -> None:
        """Take the bars away for good, because text is about to be printed."""
        self._hushed = True
        self._stop()

    @contextmanager
    def _bar(self, label: str, total: int) -> Iterator[Advance]:
        if self._bars is None:
            self._bars = Progress(*_columns(), console=self._console)
            self._bars.start()
        bars = self._bars
        task = bars.add_task(label, total=total or None)
        self._open_tasks.append(task)
        try:
            yield lambda units: bars.advance(task, units)
        finally:
            bars.stop_task(task)
            self._open_tasks.remove(task)
            if not self._open_tasks:
                self._stop()

    def _stop(self) -> None:
        if self._bars is not None:
            self._bars.stop()
            self._bars = None

    @contextmanager
    def _lines(self, label: str, total: int) -> Iterator[Advance]:
        start = last = before = self._clock()
        first: float | None = None
        done = restored = 0

        def advance(units: int) -> None:
            nonlocal done, last, before, restored, first
            done += units
            now = self._clock()
            first = now if first is None else first
            if now - first < RESTORED_SEC:
                before, restored = now, done
            if now - last >= LINE_EVERY_SEC and not self._hushed:
                last = now
                self._say(f"{label}: {_state(done, total, done - restored, now - before)}")

        yield advance
        took_sec = self._clock() - start
        if took_sec >= 1 and not self._hushed:
            units = f"{done:,} done in " if done else ""
            self._say(f"{label}: {units}{took_sec:.0f} s")

    def _say(self, line: str) -> None:
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)


def _columns() -> tuple[ProgressColumn, ...]:
    # Labels can hold file names, whose brackets are no markup.
    return (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        _Units(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )


@final
class _Units(MofNCompleteColumn):
    """Units done and in all; nothing of work that has no units."""

    def render(self, task: Task) -> Text:
        """Of one piece of work."""
        return super().render(task) if task.total or task.completed else Text()


def _state(done: int, total: int, since: int, since_sec: float) -> str:
    if not total or not done:
        return f"{done:,} so far"
    state = f"{done:,} of {total:,} ({done / total:.0%})"
    if not since:
        return state
    return f"{state}, about {since_sec * max(total - done, 0) / since:.0f} s left"
