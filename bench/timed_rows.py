"""What benches of small pieces of work share: taking turns, and the file of their rows."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path

import torch

from bench.cost.cpu_flops import processor
from trimtab.store.files import package_versions, write_json


def medians_sec(ways: Mapping[str, Callable[[], object]], repetitions: int) -> dict[str, float]:
    """How long each of some ways takes: they take turns, and the median of repetitions counts."""
    found = {name: list[float]() for name in ways}
    for _ in range(repetitions):
        for name, way in ways.items():
            began_sec = time.perf_counter()
            way()
            found[name].append(time.perf_counter() - began_sec)
    return {name: statistics.median(secs) for name, secs in found.items()}


def write_rows(path: Path, what: str, rows: Sequence[Mapping[str, object]]) -> None:
    """Write rows with the date, the threads, the processor and the packages.

    Args:
        path: The file.
        what: What the figures mean, and their unit.
        rows: The figures.
    """
    write_json(
        path,
        {
            "schema": 1,
            "date": datetime.now(UTC).date().isoformat(),
            "what": what,
            "threads": torch.get_num_threads(),
            "processor": processor(),
            "packages": package_versions(),
            "rows": rows,
        },
    )
