"""The recorded figures of the speed bench, and what lies behind them."""

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from bench.cost.cpu_flops import processor
from bench.speed.roofline import Peaks, Work
from bench.speed.rows import ROWS
from bench.speed.table import details_path
from bench.speed.timing import Figure
from trimtab.errors import InputError
from trimtab.store.files import package_versions, read_json, write_json

SCHEMA = 1
_SAME = ("processor", "threads", "dtype")
"""What rows of one file have in common."""


@dataclass(frozen=True)
class Outcome:
    """What a row came to.

    Attributes:
        figure: In the row's unit.
        pair: Of models.
        note: What the figure does not say of itself.
        sec: Seconds of a unit of work: a new token, a recorded token, or the whole.
        work: What such a unit must move and compute; None where that says nothing.
        more: Other figures.
    """

    figure: Figure
    pair: str
    note: str
    sec: Figure
    work: Work | None = None
    more: Mapping[str, Any] = field(default_factory=dict)

    def details(self, peaks: Peaks) -> dict[str, Any]:
        """For the file of details."""
        found: dict[str, Any] = {"pair": self.pair, "note": self.note, "sec": asdict(self.sec)}
        found |= {"date": datetime.now(UTC).date().isoformat(), **self.more}
        if self.work:
            least_sec = self.work.least_sec(peaks)
            found |= {"must_move_bytes": self.work.bytes, "must_compute_flops": self.work.flops}
            found |= {"least_sec": least_sec, "roofline_share": least_sec / self.sec.value}
        return found


def machine(peaks: Peaks, dtype: str) -> dict[str, Any]:
    """What the figures were measured on."""
    return {
        "processor": torch.cuda.get_device_name() if torch.cuda.is_available() else processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "dtype": dtype,
        "peak_bytes_per_sec": peaks.bytes_per_sec,
        "peak_flops_per_sec": peaks.flops_per_sec,
        "packages": package_versions(),
    }


def check_machine(path: Path, found: Mapping[str, Any]) -> None:
    """Refuse to put figures of different machines into one file.

    Raises:
        InputError: The file's rows are of another processor, number of threads or arithmetic.
    """
    if not path.is_file():
        return
    kept = read_json(path, "speed results")["machine"]
    others = [name for name in _SAME if kept.get(name) != found[name]]
    if others:
        told = ", ".join(f"{name} {kept.get(name)!r} (now {found[name]!r})" for name in others)
        raise InputError(
            f"the rows in {path} were measured with {told}",
            hint="give --fresh to begin the file anew, or another file with --out",
        )


def keep(
    path: Path, found: Mapping[str, Any], outcomes: Mapping[str, Outcome], peaks: Peaks
) -> None:
    """Put rows into the results, in place of older ones of the same name.

    Args:
        path: The results; the details lie beside it.
        found: The machine.
        outcomes: By row.
        peaks: Of the machine, in this run.
    """
    rows = read_json(path, "speed results")["rows"] if path.is_file() else {}
    rows |= {
        name: asdict(outcome.figure) | {"unit": ROWS[name].unit}
        for name, outcome in outcomes.items()
    }
    beside = details_path(path)
    details = read_json(beside, "speed details")["rows"] if beside.is_file() else {}
    details |= {name: outcome.details(peaks) for name, outcome in outcomes.items()}
    write_json(path, {"schema": SCHEMA, "machine": dict(found), "rows": rows})
    write_json(beside, {"schema": SCHEMA, "rows": details})
