"""Results of the transfer suite: a file for all runs, and one for the outcomes of single items."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from bench.transfer.cells import ADAPTED, RIVALS, Answered, cells, packed, unpacked
from trimtab.evaluate import Evaluation, scores_by_row
from trimtab.metrics import Estimate, paired_difference, pool_kinds
from trimtab.store.files import read_json, write_json

RESULTS = Path("bench/results/transfer.json")
Figures = Mapping[str, Estimate]
PAIRED = (ADAPTED, *RIVALS, "live", "head+memory")
"""Rows whose single outcomes are kept."""


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
        answered: What rows have answered to single items, by task.
    """

    domain: Figures = field(default_factory=dict)
    general: Figures = field(default_factory=dict)
    change: Figures = field(default_factory=dict)
    general_change: Figures = field(default_factory=dict)
    tasks: Mapping[str, Figures] = field(default_factory=dict)
    bytes_per_token: float = 0.0
    answered: Mapping[str, Answered] = field(default_factory=dict)

    @staticmethod
    def of(
        evaluation: Evaluation,
        tasks: Mapping[str, Figures],
        answered: Mapping[str, Answered] | None = None,
    ) -> "Found":
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
            answered or {},
        )

    def without(self, row: str) -> "Found":
        """The same without one row."""
        return self._mapped(lambda name: None if name == row else name)

    def renamed(self, names: Mapping[str, str]) -> "Found":
        """The rows that are named, under their new names."""
        return self._mapped(names.get)

    def changed_from(self, bare: Evaluation, own: Evaluation, seed: int) -> "Found":
        """The same with differences from the bare host, which read the same texts by itself.

        Args:
            bare: An evaluation of the bare host.
            own: The evaluation whose figures these are; its host was another.
            seed: Of the bootstrap.
        """
        changes: dict[str, dict[str, Estimate]] = {}
        for kind, scored in own.scored.items():
            rows = scores_by_row(scored, tuple(self.domain))
            host = scores_by_row(bare.scored[kind], ("host",))["host"]
            changes[kind] = {r: paired_difference(one, host, seed=seed) for r, one in rows.items()}
        kinds = [found for kind, found in changes.items() if kind]
        general = {row: pool_kinds([one[row] for one in kinds]) for row in self.general}
        return replace(self, change=changes[""], general_change=general)

    def _mapped(self, name_of: Any) -> "Found":
        def mapped(figures: Mapping[str, Any]) -> dict[str, Any]:
            return {name_of(row): figure for row, figure in figures.items() if name_of(row)}

        return Found(
            mapped(self.domain),
            mapped(self.general),
            mapped(self.change),
            mapped(self.general_change),
            {task: mapped(figures) for task, figures in self.tasks.items()},
            self.bytes_per_token,
            {t: Answered(one.items, mapped(one.rows)) for t, one in self.answered.items()},
        )


def add(key: Mapping[str, Any], found: Found, path: Path = RESULTS) -> None:
    """Put a step's rows into the results, in place of older ones of the same run.

    Args:
        key: What names the run: models, domain, seed, and how much text.
        found: The rows.
        path: The file.
    """
    stored = read_json(path, "results") if path.exists() else {"schema": 1, "runs": []}
    run = _run_of(stored, key, {"rows": {}, "tasks": {}})
    for row, figure in found.domain.items():
        run["rows"][row] = {"domain_bits_per_byte": asdict(figure)}
        if row in found.general:
            run["rows"][row]["general_bits_per_byte"] = asdict(found.general[row])
        if row in found.change:
            run["rows"][row]["domain_change"] = asdict(found.change[row])
        if row in found.general_change:
            run["rows"][row]["general_change"] = asdict(found.general_change[row])
    _add_cells(run, key, found, path)
    for task, figures in found.tasks.items():
        known = run["tasks"].setdefault(task, {})
        known |= {row: asdict(figure) for row, figure in figures.items()}
    _add_changes(run, found.bytes_per_token)
    write_json(path, stored)


def _run_of(stored: dict[str, Any], key: Mapping[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """The run of that name, a new one if there is none."""
    run = next((r for r in stored["runs"] if all(r.get(k) == v for k, v in key.items())), None)
    if run is None:
        run = {**key, **new}
        stored["runs"].append(run)
    return run


def outcomes_path(path: Path = RESULTS) -> Path:
    """Where the outcomes of single items lie that a run's cells follow from."""
    return path.with_name(f"{path.stem}-outcomes.json")


def _add_cells(run: dict[str, Any], key: Mapping[str, Any], found: Found, path: Path) -> None:
    """Keep the items' outcomes, and compare the rows of which there are some.

    Rows that have answered other items than these are let go of.
    """
    if not found.answered:
        return
    place = outcomes_path(path)
    stored = read_json(place, "outcomes") if place.exists() else {"schema": 1, "runs": []}
    tasks = _run_of(stored, key, {"tasks": {}})["tasks"]
    for task, answered in found.answered.items():
        if task not in tasks or tasks[task]["items"] != answered.items:
            tasks[task] = {"items": answered.items, "rows": {}}
            run["tasks"].pop(task, None)
        kept = {row: packed(one) for row, one in answered.rows.items() if row in PAIRED}
        tasks[task]["rows"] |= kept
    write_json(place, stored)
    outcomes = {
        task: {row: unpacked(text) for row, text in kept["rows"].items()}
        for task, kept in tasks.items()
    }
    run["cells"] = {
        rival: {task: asdict(cell) for task, cell in by_task.items()}
        for rival, by_task in cells(outcomes).items()
    }


def _add_changes(run: dict[str, Any], bytes_per_token: float) -> None:
    """Perplexity a host token against the bare host: 2 ^ (bits a byte * bytes a token)."""
    if "host" not in run["rows"] or not bytes_per_token:
        return
    host = run["rows"]["host"]["domain_bits_per_byte"]["mean"]
    for row in run["rows"].values():
        bits = (row["domain_bits_per_byte"]["mean"] - host) * bytes_per_token
        row["perplexity_change_percent"] = 100 * (2**bits - 1)
