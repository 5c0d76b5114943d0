"""Time and memory of a piece of work, as this process spends them."""

import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from trimtab.comparing.values import Step
from trimtab.machine import free_memory_bytes, told_bytes

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@dataclass
class Watch:
    """What a piece of work took.

    Attributes:
        sec: Seconds by the clock.
        cpu_sec: Processor-seconds of all threads of the process.
        peak_bytes: Greatest memory of the process, and of its accelerator.
    """

    sec: float = 0.0
    cpu_sec: float = 0.0
    peak_bytes: int = 0

    def step(self, name: str, flops: float, *, serves_all_hosts: bool = False) -> Step:
        """The work as a step of a method."""
        return Step(
            name=name,
            flops=flops,
            sec=self.sec,
            cpu_sec=self.cpu_sec,
            peak_bytes=self.peak_bytes,
            serves_all_hosts=serves_all_hosts,
        )


@contextmanager
def watched() -> Iterator[Watch]:
    """Time what is done inside, and find its greatest memory.

    On Linux the peak is that of the work alone; elsewhere that of the process so far.
    """
    watch = Watch()
    _reset_peak()
    started, used = time.perf_counter(), time.process_time()
    try:
        yield watch
    finally:
        watch.sec = time.perf_counter() - started
        watch.cpu_sec = time.process_time() - used
        watch.peak_bytes = _peak_bytes()


def _reset_peak() -> None:
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    try:
        # proc(5): 5 resets the peak of the resident set to its present size.
        _CLEAR.write_text("5")
    except OSError:
        pass


def _peak_bytes() -> int:
    on_device = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
    peak = told_bytes(_STATUS, "VmHWM:")
    if peak is None:
        # Kibibytes but on macOS, which counts bytes.
        unit = 1 if sys.platform == "darwin" else 1024
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return max(peak, on_device)


def memory_bytes() -> int:
    """Memory that this process may have in all; of its accelerator if there is one.

    That is what it has and what is free; where the system does not say what is available, a half
    of all memory.
    """
    if torch.cuda.is_available():
        # What torch has reserved and not given out is its own to use.
        return torch.cuda.memory_reserved() + torch.cuda.mem_get_info()[0]
    return held_bytes() + free_memory_bytes()


def held_bytes() -> int:
    """Memory that this process has now, or of its accelerator if there is one."""
    if torch.cuda.is_available():
        return torch.cuda.memory_allocated()
    return told_bytes(_STATUS, "VmRSS:") or 0
