"""The table of the speed bench's recorded figures."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.speed.rows import DEMO_ROW, ROWS
from trimtab.store.files import read_json

RESULTS = Path("bench/results/speed.json")
LOCKSTEP_GOAL = 2.0
"""How many times as fast as lock-step proxy tuning the live rows should be."""


def details_path(path: Path) -> Path:
    """What lies behind the figures of a file: rooflines, notes, seconds."""
    return path.with_name(f"{path.stem}-details.json")


def table(path: Path, name: str = "") -> str:
    """All rows with their spread, goals and rooflines, and what follows from them.

    Args:
        path: The results.
        name: What the table calls them (default: the path).
    """
    found = read_json(path, "speed results")
    beside = details_path(path)
    details = read_json(beside, "speed details")["rows"] if beside.is_file() else {}
    lines = [
        "| row | what | value | spread | goal | must move | must compute | of the roofline |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in ROWS.values():
        if row.name in found["rows"]:
            cells = _cells(row.name, found["rows"][row.name], details.get(row.name, {}))
            lines.append(f"| {row.name} | {row.what} | {' | '.join(cells)} |")
    said = [f"* {line}" for line in _conclusions(found, details)]
    machine = found["machine"]
    source = (
        f"Measured on {machine['processor']}, {machine['threads']} threads, {machine['dtype']}:"
        f" {machine['peak_bytes_per_sec'] / 1e9:.1f} GB/s of a matrix times a vector,"
        f" {machine['peak_flops_per_sec'] / 1e9:.0f} GFLOP/s of a matrix product."
        f" File: `{name or path.as_posix()}`."
    )
    return "\n".join([*lines, "", *said, *([""] if said else []), source])


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


def _conclusions(found: Mapping[str, Any], details: Mapping[str, Any]) -> list[str]:
    """What follows from several rows together."""
    rows = found["rows"]
    return [
        *_host_share(found["machine"], [details[name] for name in rows if name in details]),
        *_over_lockstep(rows),
        *_plain_goal(rows, details.get("live-plain", {})),
        *_pairs({name: details[name]["pair"] for name in rows if name in details}),
    ]


def _host_share(machine: Mapping[str, Any], details: Sequence[Mapping[str, Any]]) -> list[str]:
    """How near the bare host comes to the roofline, by the first row of the usual pair."""
    for one in details:
        if "host_must_move_bytes" in one:
            least_sec = max(
                one["host_must_move_bytes"] / machine["peak_bytes_per_sec"],
                one["host_must_compute_flops"] / machine["peak_flops_per_sec"],
            )
            sec = one["host_sec_per_token"]
            return [
                f"the bare host: {one['host_must_move_bytes'] / 1e6:,.0f} MB a token,"
                f" {1_000 * sec:.0f} ms, {least_sec / sec:.0%} of the roofline"
            ]
    return []


def _over_lockstep(rows: Mapping[str, Any]) -> list[str]:
    said = []
    for name in ("live-plain", "live-speculative"):
        if {name, "lockstep-proxy"} <= rows.keys():
            times = rows["lockstep-proxy"]["value"] / rows[name]["value"]
            met = "met" if times >= LOCKSTEP_GOAL else "**missed**"
            goal = f"goal: {LOCKSTEP_GOAL:g}, {met}"
            said.append(f"{name}: {times:.2f} times as fast as lock-step proxy tuning ({goal})")
    return said


def _plain_goal(rows: Mapping[str, Any], details: Mapping[str, Any]) -> list[str]:
    share = details.get("small_over_host")
    if share is None or "live-plain" not in rows:
        return []
    goal = 1.05 * (1 + 2 * share)
    met = "met" if rows["live-plain"]["value"] <= goal else "**missed**"
    return [
        f"live-plain: the small model alone takes {share:.2f} of the host's time a token, so that"
        f" its goal, 1.05 x (1 + 2 x {share:.2f}), is {goal:.2f}: {met}"
    ]


def _pairs(pairs: Mapping[str, str]) -> list[str]:
    usual = sorted({pair for name, pair in pairs.items() if name != DEMO_ROW and pair})
    return [f"pair of models: {', '.join(usual)}"] if usual else []
