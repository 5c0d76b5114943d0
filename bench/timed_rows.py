"""The file of a bench that times small pieces of work: its rows, and what they were measured on."""

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path

import torch

from bench.cost.cpu_flops import processor
from trimtab.store.files import package_versions, write_json


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
