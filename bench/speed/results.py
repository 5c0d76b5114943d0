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
from bench.speed.rows import ROWS, Settings
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
        repetitions: How often the figure was measured, of which it is the median.
        work: What such a unit must move and compute; None where that says nothing.
        more: Other figures.
    """

    figure: Figure
    pair: str
    note: str
    sec: Figure
    repetitions: int
    work: Work | None = None
    more: Mapping[str, Any] = field(default_factory=dict)

    def details(self, here: Mapping[str, Any]) -> dict[str, Any]:
        """For the file of details, with the machine as this run found it."""
        found: dict[str, Any] = {"pair": self.pair, "note": self.note, "sec": asdict(self.sec)}
        found |= {"date": datetime.now(UTC).date().isoformat(), "repetitions": self.repetitions}
        found |= {"machine": dict(here), **self.more}
        if self.work:
            peaks = Peaks(here["peak_bytes_per_sec"], here["peak_flops_per_sec"])
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


def keep(path: Path, here: Mapping[str, Any], outcomes: Mapping[str, Outcome]) -> Mapping[str, int]:
    """Put rows into the results, in place of older ones that were not measured more often.

    Args:
        path: The results; the details lie beside it.
        here: The machine, as this run found it.
        outcomes: By row.

    Returns:
        Repetitions of the older rows that stay, by row.
    """
    kept: dict[str, Any] = {"machine": here, "rows": {}}
    if path.is_file():
        kept = read_json(path, "speed results")
    beside = details_path(path)
    details = read_json(beside, "speed details")["rows"] if beside.is_file() else {}
    for one in details.values():
        # Rows of files that are older than this entry are of the machine that the file names.
        one.setdefault("machine", kept["machine"])
    counts = {name: _repetitions(row, details.get(name, {})) for name, row in kept["rows"].items()}
    stay = {n: counts[n] for n, one in outcomes.items() if one.repetitions < counts.get(n, 0)}
    new = {name: outcome for name, outcome in outcomes.items() if name not in stay}
    if not new:
        return stay
    rows = kept["rows"] | {
        name: asdict(outcome.figure) | {"unit": ROWS[name].unit} for name, outcome in new.items()
    }
    details |= {name: outcome.details(here) for name, outcome in new.items()}
    write_json(path, {"schema": SCHEMA, "machine": dict(here), "rows": rows})
    write_json(beside, {"schema": SCHEMA, "rows": details})
    return stay


def _repetitions(row: Mapping[str, Any], details: Mapping[str, Any]) -> int:
    """How often a row was measured; what an older file does not say is taken to be the usual."""
    usual = 1 if row["low"] == row["high"] else Settings().repetitions
    return details.get("repetitions", usual)
