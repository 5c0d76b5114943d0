"""Seconds by step, kept in a file, so that a run that was interrupted tells of all its time."""

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from trimtab.errors import InputError
from trimtab.store.files import write_json


class Clock:
    """Adds up the time that each step takes, until the step is done.

    A step that was done before takes next to no time again; its first time stays, unless its
    result has been deleted since. The seconds of a run that was killed are lost, and known to be.
    """

    def __init__(self, path: Path) -> None:
        """Continue with the times in a file, if it is there."""
        self._path = path
        self._steps: dict[str, dict[str, float | bool]] = {}
        if path.is_file():
            try:
                self._steps = json.loads(path.read_text(encoding="utf-8"))
            except ValueError as error:
                raise InputError(f"{path} is no JSON: {error}", hint="delete that file") from error

    @contextmanager
    def step(self, name: str, result: Path | None = None) -> Iterator[None]:
        """Time a step.

        Args:
            name: Name of the step.
            result: What the step leaves; without it the step begins anew.
        """
        print(f"\n== {name}", flush=True)
        known = self._steps.get(name)
        if known is None or (result is not None and not result.exists()):
            known = self._steps[name] = {"wall_sec": 0.0, "done": False}
        elif known.get("open"):
            known["has_lost"] = True
        if known["done"]:
            yield
            return
        started = time.monotonic()
        known["open"] = True
        write_json(self._path, self._steps)
        try:
            yield
            known["done"] = True
        finally:
            known["open"] = False
            known["wall_sec"] += time.monotonic() - started
            write_json(self._path, self._steps)

    @property
    def has_lost(self) -> bool:
        """Whether a step was killed, so that its time is longer than what is known."""
        return any(step.get("has_lost") for step in self._steps.values())

    @property
    def wall_sec(self) -> dict[str, float]:
        """Seconds by step, in the order in which the steps first ran."""
        return {name: float(step["wall_sec"]) for name, step in self._steps.items()}
