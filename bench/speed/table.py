"""The table of the speed bench's recorded figures."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.speed.rows import DEMO_ROW, ROWS
from bench.speed.timing import Figure
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
    # Rows of older files do not say what machine they met: it is the file's.
    details = {n: {"machine": found["machine"]} | details.get(n, {}) for n in found["rows"]}
    lines = [
        "| row | what | value | spread | goal | must move | must compute | of the roofline"
        " | when |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in ROWS.values():
        if row.name in found["rows"]:
            cells = _cells(row.name, found["rows"][row.name], details[row.name])
            lines.append(f"| {row.name} | {row.what} | {' | '.join(cells)} |")
    said = [f"* {line}" for line in _conclusions(found["rows"], details)]
    machine = found["machine"]
    source = (
        f"Measured on {machine['processor']}, {machine['threads']} threads, {machine['dtype']}."
        f" {_peaks(details)} File: `{name or path.as_posix()}`."
    )
    return "\n".join([*lines, "", *said, *([""] if said else []), source])


def _peaks(details: Mapping[str, Any]) -> str:
    """How fast the machine was when each row was measured."""
    rows: dict[str, list[str]] = {}
    for name in (name for name in ROWS if name in details):
        machine = details[name]["machine"]
        peaks = (
            f"{machine['peak_bytes_per_sec'] / 1e9:.1f} GB/s of a matrix times a vector,"
            f" {machine['peak_flops_per_sec'] / 1e9:.0f} GFLOP/s of a matrix product"
        )
        rows.setdefault(peaks, []).append(name)
    said = (
        f"{peaks} ({', '.join(names)})" if len(rows) > 1 else peaks for peaks, names in rows.items()
    )
    return f"Peaks: {'; '.join(said)}."


def _cells(name: str, row: Mapping[str, Any], details: Mapping[str, Any]) -> Sequence[str]:
    known, unit = ROWS[name], " s" if row["unit"] == "sec" else ""
    goal = known.goal
    if known.has_bound:
        goal += f": {_verdict(_figure(row), known.is_met)}"
    low, high = _shown(row["low"]), _shown(row["high"])
    spread = "once" if row["low"] == row["high"] else f"{low} - {high}"
    moved, computed, share = "", "", ""
    if details.get("must_move_bytes"):
        moved = f"{details['must_move_bytes'] / 1e6:,.0f} MB"
    if details.get("must_compute_flops"):
        computed = f"{details['must_compute_flops'] / 1e9:,.1f} GFLOP"
        # More than all of a peak is a peak that was measured while the machine was slow.
        found = details["roofline_share"]
        share = f"{found:.0%}" if found <= 1 else "peak too low"
    when = details.get("date", "")
    return (f"{_shown(row['value'])}{unit}", spread, goal, moved, computed, share, when)


def _figure(row: Mapping[str, Any]) -> Figure:
    return Figure(row["value"], row["low"], row["high"])


def _verdict(figure: Figure, is_met: Callable[[float], bool]) -> str:
    """Whether a goal is met, and whether every repetition says so."""
    met = "met" if is_met(figure.value) else "**missed**"
    return met if is_met(figure.low) == is_met(figure.high) else f"{met} within noise"


def _shown(value: float) -> str:
    return f"{value:.3g}" if value < 10 else f"{value:.1f}"


def _conclusions(rows: Mapping[str, Any], details: Mapping[str, Any]) -> list[str]:
    """What follows from several rows together."""
    return [
        *_host_share(list(details.values())),
        *_over_lockstep(rows),
        *_plain_goal(rows, details.get("live-plain", {})),
        *_first_mount(rows, details.get("mount", {})),
        *_pairs({name: one["pair"] for name, one in details.items() if "pair" in one}),
    ]


def _host_share(details: Sequence[Mapping[str, Any]]) -> list[str]:
    """How near the bare host comes to the roofline, by the first row of the usual pair."""
    for one in details:
        if "host_must_move_bytes" in one:
            machine, sec = one["machine"], one["host_sec_per_token"]
            least_sec = max(
                one["host_must_move_bytes"] / machine["peak_bytes_per_sec"],
                one["host_must_compute_flops"] / machine["peak_flops_per_sec"],
            )
            return [
                f"the bare host: {one['host_must_move_bytes'] / 1e6:,.0f} MB a token,"
                f" {1_000 * sec:.0f} ms, {least_sec / sec:.0%} of the roofline"
            ]
    return []


def _over_lockstep(rows: Mapping[str, Any]) -> list[str]:
    said = []
    for name in ("live-plain", "live-speculative"):
        if {name, "lockstep-proxy"} <= rows.keys():
            times = _figure(rows["lockstep-proxy"]).over(_figure(rows[name]))
            goal = f"goal: {LOCKSTEP_GOAL:g}, {_verdict(times, lambda x: x >= LOCKSTEP_GOAL)}"
            said.append(
                f"{name}: {times.value:.2f} times as fast as lock-step proxy tuning ({goal})"
            )
    return said


def _plain_goal(rows: Mapping[str, Any], details: Mapping[str, Any]) -> list[str]:
    """Two bounds: a small model that wastes more of its time than the host would widen its own."""
    if "live-plain" not in rows or "small_over_host" not in details:
        return []
    by_bytes = details["must_move_bytes"] / details["host_must_move_bytes"] - 1
    bounds = (
        _plain_bound("by the bytes that must be moved", by_bytes, rows["live-plain"]),
        _plain_bound(
            "by its time, overhead included", details["small_over_host"], rows["live-plain"]
        ),
    )
    return [
        "live-plain: the goal is 1.05 x (1 + 2 x the small model's share of the host's token);"
        f" {'; '.join(bounds)}"
    ]


def _plain_bound(how: str, share: float, row: Mapping[str, Any]) -> str:
    bound = 1.05 * (1 + 2 * share)
    verdict = _verdict(_figure(row), lambda value: value <= bound)
    return f"{how} {share:.2f}, so {bound:.2f}: {verdict}"


def _first_mount(rows: Mapping[str, Any], details: Mapping[str, Any]) -> list[str]:
    if "mount" not in rows or "probe_sec" not in details:
        return []
    first_sec = rows["mount"]["value"] + details["probe_sec"]
    return [
        f"mount: {_shown(first_sec)} s for the first adapter on a host, whose pass over the probe"
        f" text takes {_shown(details['probe_sec'])} s once"
    ]


def _pairs(pairs: Mapping[str, str]) -> list[str]:
    usual = sorted({pair for name, pair in pairs.items() if name != DEMO_ROW and pair})
    return [f"pair of models: {', '.join(usual)}"] if usual else []
