"""The recorded figures of the speed bench, what lies behind them, and their table."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from bench.cost.cpu_flops import processor
from bench.speed.roofline import Peaks, Work
from bench.speed.rows import DEMO_ROW, ROWS
from bench.speed.timing import Figure
from trimtab.errors import InputError
from trimtab.store.files import package_versions, read_json, write_json

RESULTS = Path("bench/results/speed.json")
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
        "processor": processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "dtype": dtype,
        "peak_bytes_per_sec": peaks.bytes_per_sec,
        "peak_flops_per_sec": peaks.flops_per_sec,
        "packages": package_versions(),
    }


def details_path(path: Path) -> Path:
    """What lies behind the figures of a file: rooflines, notes, seconds."""
    return path.with_name(f"{path.stem}-details.json")


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


def table(path: Path) -> str:
    """All rows with their spread, goals and rooflines, and what follows from them."""
    found = read_json(path, "speed results")
    beside = details_path(path)
    details = read_json(beside, "speed details")["rows"] if beside.is_file() else {}
    lines = [
        "| row | what | value | spread | goal | must move | must compute | of the roofline |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, row in ROWS.items():
        if name in found["rows"]:
            cells = _cells(name, found["rows"][name], details.get(name, {}))
            lines.append(f"| {name} | {row.what} | {' | '.join(cells)} |")
    machine = found["machine"]
    return "\n".join(
        [
            *lines,
            "",
            *(f"* {line}" for line in _conclusions(found["rows"], details)),
            *([""] if _conclusions(found["rows"], details) else []),
            f"Measured on {machine['processor']}, {machine['threads']} threads, {machine['dtype']}:"
            f" {machine['peak_bytes_per_sec'] / 1e9:.1f} GB/s of a matrix times a vector,"
            f" {machine['peak_flops_per_sec'] / 1e9:.0f} GFLOP/s of a matrix product."
            f" File: `{path.as_posix()}`.",
        ]
    )


def _cells(name: str, row: Mapping[str, Any], details: Mapping[str, Any]) -> Sequence[str]:
    known, unit = ROWS[name], " s" if row["unit"] == "sec" else ""
    met = known.is_met(row["value"])
    goal = known.goal + ("" if met is None else ": met" if met else ": **missed**")
    low, high = _shown(row["low"]), _shown(row["high"])
    spread = "once" if row["low"] == row["high"] else f"{low} - {high}"
    moved, computed, share = "", "", ""
    if details.get("must_move_bytes"):
        moved = f"{details['must_move_bytes'] / 1e6:,.0f} MB"
    if details.get("must_compute_flops"):
        computed = f"{details['must_compute_flops'] / 1e9:,.1f} GFLOP"
        share = f"{details['roofline_share']:.0%}"
    return (f"{_shown(row['value'])}{unit}", spread, goal, moved, computed, share)


def _shown(value: float) -> str:
    return f"{value:.3g}" if value < 10 else f"{value:.1f}"


def _conclusions(rows: Mapping[str, Any], details: Mapping[str, Any]) -> list[str]:
    """What the issue's goals ask of several rows together."""
    found = []
    for name in ("live-plain", "live-speculative"):
        if {name, "lockstep-proxy"} <= rows.keys():
            times = rows["lockstep-proxy"]["value"] / rows[name]["value"]
            met = "met" if times >= 2 else "**missed**"
            found.append(
                f"{name}: {times:.2f} times as fast as lock-step proxy tuning (goal 2: {met})"
            )
    share = details.get("live-plain", {}).get("small_over_host")
    if share and "live-plain" in rows:
        goal = 1.05 * (1 + 2 * share)
        met = "met" if rows["live-plain"]["value"] <= goal else "**missed**"
        found.append(
            f"live-plain: the small model alone takes {share:.2f} of the host's time per token,"
            f" so that the goal, 1.05 x (1 + 2 x {share:.2f}), is {goal:.2f}: {met}"
        )
    pairs = {name: one["pair"] for name, one in details.items() if name in rows}
    usual = {pair for name, pair in pairs.items() if name != DEMO_ROW and pair}
    if usual:
        found.append(f"pair of models: {', '.join(sorted(usual))}; {DEMO_ROW}: demo")
    return found
