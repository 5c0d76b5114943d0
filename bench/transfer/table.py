"""Recorded runs of the transfer suite as Markdown."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.transfer.cells import MARGIN_POINTS, RIVALS
from bench.transfer.results import RESULTS
from trimtab.comparing.figures import ENOUGH, SURE
from trimtab.store.files import read_json

ORDER = (
    *("host", "temperature", "prompt", "bias", "reference", "expert", "mixture"),
    *("proxy", "proxy-0.5", "lora-host", "lora-host+memory", "label-head", "hostfit-head"),
    *("bytes", "state", "head", "memory", "head+memory", "head-shuffled", "memory-shuffled"),
    *("memory, host keys", "head+memory, host keys", "memory-shuffled, host keys"),
    *("live", "all", "all, host keys"),
)
"""Rows in a table: what there was before, what needs the host's training, then the adapter's."""


def table(path: Path = RESULTS) -> str:
    """All runs as Markdown: bits per byte and perplexity against the host, and tasks."""
    runs = read_json(path, "results")["runs"]
    parts = [part for run in runs for part in (_rows(run), _tasks(run)) if part]
    return "\n\n".join([*parts, *_cells(runs)])


def _rows(run: Mapping[str, Any]) -> str:
    host, lora = run["rows"].get("host"), run["rows"].get("lora-host")
    heads = ["row", "bits per byte", "against host", "perplexity", "general text"]
    heads += ["of LoRA's gain"] if lora else []
    lines = [
        f"### {run['pair']}, {run['domain']}, seed {run['seed']}",
        "",
        f"| {' | '.join(heads)} |",
        f"|{len(heads) * '---|'}",
    ]
    for name, row in sorted(run["rows"].items(), key=lambda item: ORDER.index(item[0])):
        figure = row["domain_bits_per_byte"]
        cells = [f"{figure['mean']:.3f} ± {figure['stderr']:.3f}"]
        for base, kind in (("domain", "domain_change"), ("general", "general_change")):
            reference = host and host.get(f"{base}_bits_per_byte")
            own = row.get(f"{base}_bits_per_byte")
            cells.append(_percent(own, reference, row.get(kind)))
        change = row.get("perplexity_change_percent")
        shown = "" if change is None or name == "host" else f"{change:+.1f} %"
        cells.insert(2, shown)
        if lora:
            cells.append("" if row is host else _share(row, host, lora))
        lines.append(f"| {' | '.join([name, *cells])} |")
    return "\n".join(lines)


def _tasks(run: Mapping[str, Any]) -> str:
    """Figures by row, a column a task, in percent."""
    tasks = run["tasks"]
    if not tasks:
        return ""
    rows = {row for figures in tasks.values() for row in figures}
    lines = [
        f"| row | {' | '.join(f'{task}, %' for task in tasks)} |",
        f"|---|{'---|' * len(tasks)}",
    ]
    for row in sorted(rows, key=ORDER.index):
        found = (figures.get(row) for figures in tasks.values())
        cells = [f"{100 * f['mean']:.1f} ± {100 * f['stderr']:.1f}" if f else "" for f in found]
        lines.append(f"| {row} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cells(runs: Sequence[Mapping[str, Any]]) -> list[str]:
    """For each rival how many cells there are, and the cells themselves."""
    parts = []
    for rival in RIVALS:
        found = [
            (run, task, cell)
            for run in runs
            for task, cell in run.get("cells", {}).get(rival, {}).items()
        ]
        if found:
            parts += [f"### all against {rival}, task by task", _count(found), _cell_table(found)]
    return parts


def _count(found: Sequence[tuple[Mapping[str, Any], str, Mapping[str, Any]]]) -> str:
    shares = [cell["share"] for _, _, cell in found]
    told = [cell["share"] for _, _, cell in found if cell["telling"] >= ENOUGH]
    likely, sure = sum(s >= 0.5 for s in shares), sum(s >= SURE for s in told)
    surely_not = sum(s <= 1 - SURE for s in told)
    return (
        f"At most {MARGIN_POINTS:g} points below it in {likely} of {len(shares)} cells"
        f" ({100 * likely / len(shares):.0f} %) by the bootstrap's median; surely so"
        f" (at least {100 * SURE:.0f} % of the draws) in {sure}, surely not in {surely_not}."
    )


def _cell_table(found: Sequence[tuple[Mapping[str, Any], str, Mapping[str, Any]]]) -> str:
    within = f"draws at most {MARGIN_POINTS:g} below"
    lines = [f"| pair | domain | seed | task | items | points | {within} |", f"|{7 * '---|'}"]
    for run, task, cell in found:
        points = f"{cell['difference_points']:+.1f} ± {cell['stderr_points']:.1f}"
        share = f"{100 * cell['share']:.0f} %"
        where = f"{run['pair']} | {run['domain']} | {run['seed']}"
        lines.append(f"| {where} | {task} | {cell['items']:,} | {points} | {share} |")
    return "\n".join(lines)


def _share(row: Any, host: Any, lora: Any) -> str:
    """Which part of LoRA's gain on the host a row's is; nothing where LoRA gains nothing."""
    if not host:
        return ""
    own, bare, tuned = (one["domain_bits_per_byte"]["mean"] for one in (row, host, lora))
    return f"{round(100 * (bare - own) / (bare - tuned))} %" if tuned < bare else ""


def _percent(own: Any, host: Any, change: Any) -> str:
    if not own or not host or own is host:
        return ""
    scale = 100 / host["mean"]
    error = f" ± {change['stderr'] * scale:.1f}" if change and change["stderr"] else ""
    return f"{(own['mean'] - host['mean']) * scale:+.1f}{error} %"
