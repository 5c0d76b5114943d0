"""Processes that tests start, stop and kill."""

import multiprocessing
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.process import BaseProcess

from trimtab.config import RecordConfig
from trimtab.record import record


def started(target: Callable[..., object], *args: object) -> BaseProcess:
    """A function at work in a process of its own, which no test's state reaches."""
    # All come from one process that has torch loaded, which would take seconds each time.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["trimtab.tune", "trimtab.record", "trimtab.fit"])
    process = context.Process(target=target, args=args)
    process.start()
    return process


@contextmanager
def _slow(label: str, total: int) -> Iterator[Callable[[int], None]]:
    yield lambda _: time.sleep(0.05)


def record_slowly(config: RecordConfig) -> None:
    """Record so that there is time to be stopped."""
    record(config, progress=_slow)
