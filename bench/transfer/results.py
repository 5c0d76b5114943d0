"""Results of the transfer suite: one file for all runs, and its table."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from trimtab.evaluate import Evaluation
from trimtab.metrics import Estimate
from trimtab.store.files import read_json, write_json

RESULTS = Path("bench/results/transfer.json")
Figures = Mapping[str, Estimate]


@dataclass(frozen=True)
class Found:
    """What a step found, by row.

    Attributes:
        domain: Bits per byte on test text.
        general: Bits per byte on general text, kinds pooled with equal weight.
        change: Against the bare host on test text, in bits per byte.
        general_change: Against the bare host on general text.
        tasks: Figures by task and row.
        bytes_per_token: Of the test text in the host's tokens; 0 where none was scored.
    """

    domain: Figures = field(default_factory=dict)
    general: Figures = field(default_factory=dict)
    change: Figures = field(default_factory=dict)
    general_change: Figures = field(default_factory=dict)
    tasks: Mapping[str, Figures] = field(default_factory=dict)
    bytes_per_token: float = 0.0

    @staticmethod
    def of(evaluation: Evaluation, tasks: Mapping[str, Figures]) -> "Found":
        """Take the figures of an evaluation."""
        result = evaluation.report.hosts[0]
        sizes = [size for kept in evaluation.scored[""] for size in kept.on_host.sizes]
        return Found(
            result.domain,
            result.general,
            result.domain_change,
            result.general_change,
            tasks,
            sum(sizes) / len(sizes),
        )

    def without(self, row: str) -> "Found":
        """The same without one row."""
        return self._mapped(lambda name: None if name == row else name)

    def renamed(self, names: Mapping[str, str]) -> "Found":
        """The rows that are named, under their new names."""
        return self._mapped(names.get)

    def without_changes(self) -> "Found":
        """The same without differences, where the host of the evaluation was not the bare one."""
        return replace(self, change={}, general_change={})

    def _mapped(self, name_of: Any) -> "Found":
        def mapped(figures: Figures) -> Figures:
            return {name_of(row): figure for row, figure in figures.items() if name_of(row)}

        return Found(
            mapped(self.domain),
            mapped(self.general),
            mapped(self.change),
            mapped(self.general_change),
            {task: mapped(figures) for task, figures in self.tasks.items()},
            self.bytes_per_token,
        )


def add(key: Mapping[str, Any], found: Found, path: Path = RESULTS) -> None:
    """Put a step's rows into the results, in place of older ones of the same run.

    Args:
        key: What names the run: pair, domain, seed, train_tokens.
        found: The rows.
        path: The file.
    """
    stored = read_json(path, "results") if path.exists() else {"schema": 1, "runs": []}
    run = next((r for r in stored["runs"] if all(r[k] == v for k, v in key.items())), None)
    if run is None:
        run = {**key, "rows": {}, "tasks": {}}
        stored["runs"].append(run)
    for row, figure in found.domain.items():
        run["rows"][row] = {"domain_bits_per_byte": asdict(figure)}
        if row in found.general:
            run["rows"][row]["general_bits_per_byte"] = asdict(found.general[row])
        if row in found.change:
            run["rows"][row]["domain_change"] = asdict(found.change[row])
        if row in found.general_change:
            run["rows"][row]["general_change"] = asdict(found.general_change[row])
    for task, figures in found.tasks.items():
        known = run["tasks"].setdefault(task, {})
        known |= {row: asdict(figure) for row, figure in figures.items()}
    _add_changes(run, found.bytes_per_token)
    write_json(path, stored)


def _add_changes(run: dict[str, Any], bytes_per_token: float) -> None:
    """Perplexity a host token against the bare host: 2 ^ (bits a byte * bytes a token)."""
    if "host" not in run["rows"] or not bytes_per_token:
        return
    host = run["rows"]["host"]["domain_bits_per_byte"]["mean"]
    for row in run["rows"].values():
        bits = (row["domain_bits_per_byte"]["mean"] - host) * bytes_per_token
        row["perplexity_change_percent"] = 100 * (2**bits - 1)


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
    return "\n\n".join(part for run in runs for part in (_rows(run), _tasks(run)) if part)


def _rows(run: Mapping[str, Any]) -> str:
    host = run["rows"].get("host")
    lines = [
        f"### {run['pair']}, {run['domain']}, seed {run['seed']}",
        "",
        "| row | bits per byte | against host | perplexity | general text |",
        "|---|---|---|---|---|",
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
        lines.append(f"| {name} | {cells[0]} | {cells[1]} | {shown} | {cells[2]} |")
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


def _percent(own: Any, host: Any, change: Any) -> str:
    if not own or not host or own is host:
        return ""
    scale = 100 / host["mean"]
    error = f" ± {change['stderr'] * scale:.1f}" if change and change["stderr"] else ""
    return f"{(own['mean'] - host['mean']) * scale:+.1f}{error} %"
