"""The report of an evaluation: a terminal table, report.json and report.html."""

import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from trimtab.errors import InputError
from trimtab.metrics import Estimate
from trimtab.report_page import page
from trimtab.report_values import (
    CONTROLS,
    ROWS,
    STEERED,
    Completion,
    Figures,
    GrowthPoint,
    HostResult,
    Report,
    TokenChange,
    ordered,
    read_report,
    report_json,
    worse_rows,
)
from trimtab.report_words import change_percent, printable
from trimtab.store.files import write_atomic, write_json

__all__ = [
    "CONTROLS",
    "ROWS",
    "STEERED",
    "Completion",
    "Estimate",
    "GrowthPoint",
    "HostResult",
    "Report",
    "TokenChange",
    "merge_hosts",
    "read_report",
    "report_json",
    "table",
    "write_report",
]

_WIDTH = 100
_MARK = "!"


def write_report(report: Report, folder: Path) -> None:
    """Write report.json and report.html into a folder, each whole or not at all.

    Raises:
        NumericalError: A figure is not a finite number; nothing is written.
        StorageError: The disk is full or the folder cannot be written.
    """
    write_json(folder / "report.json", report_json(report))
    write_atomic(folder / "report.html", page(report).encode())


def merge_hosts(reports: Sequence[Report]) -> Report:
    """Join reports of one adapter on several hosts into one.

    Tokens, completions and growth are those of the first report that has them.

    Raises:
        InputError: No report, different domains, different adapters, or a host twice.
    """
    _refuse_unlike(reports)
    with_tokens = next((report for report in reports if report.tokens), reports[0])
    return Report(
        domain=reports[0].domain,
        hosts=tuple(result for report in reports for result in report.hosts),
        wall_sec=_joined_sec(report.wall_sec for report in reports),
        adapter_bytes=reports[0].adapter_bytes,
        tokens=with_tokens.tokens,
        tokens_name=with_tokens.tokens_name,
        completions=next((report.completions for report in reports if report.completions), ()),
        growth=next((report.growth for report in reports if report.growth), ()),
        settings=_joined_settings(report.settings for report in reports),
    )


def _refuse_unlike(reports: Sequence[Report]) -> None:
    if not reports:
        raise InputError("there is no report to join", hint="give at least one report")
    domains = sorted({report.domain for report in reports})
    sizes = {tuple(sorted(report.adapter_bytes.items())) for report in reports}
    if len(domains) > 1 or len(sizes) > 1:
        raise InputError(
            f"the {len(reports)} reports are of {len(domains)} domains ({', '.join(domains)}) and "
            f"{len(sizes)} different adapters, expected one of each",
            hint="join only reports of the same adapter, evaluated on the same domain",
        )
    names = [(result.host, result.small) for report in reports for result in report.hosts]
    twice = sorted({host for host, small in names if names.count((host, small)) > 1})
    if twice:
        raise InputError(
            f"hosts that stand in more than one report: {', '.join(twice)}",
            hint="leave the older report out",
        )


def _joined_sec(parts: Iterable[Mapping[str, float]]) -> dict[str, float]:
    # Equal seconds are one run that several reports tell of (tune, record, fit); others are runs
    # of their own, one a host (mount, evaluate).
    distinct: dict[str, set[float]] = {}
    for part in parts:
        for step, seconds in part.items():
            distinct.setdefault(step, set()).add(seconds)
    return {step: sum(sorted(values)) for step, values in distinct.items()}


def _joined_settings(parts: Iterable[Mapping[str, str]]) -> dict[str, str]:
    joined: dict[str, list[str]] = {}
    for part in parts:
        for key, value in part.items():
            if value not in joined.setdefault(key, []):
                joined[key].append(value)
    return {key: "; ".join(values) for key, values in joined.items()}


def table(report: Report) -> str:
    """Draw one table a host for a terminal: bits per byte and change against the host, by row.

    A steered row that is worse than the host by more than one standard error carries a mark.
    """
    out = io.StringIO()
    console = Console(file=out, width=_WIDTH, color_system=None, force_terminal=False)
    for result in report.hosts:
        console.print(_host_table(result, report.domain))
    if any(_MARK in line for result in report.hosts for line in _marks(result)):
        note = f"{_MARK} steered, and worse than the host by more than one standard error"
        console.print(Text(f"  {note}"))
    lines = (line.rstrip() for line in out.getvalue().splitlines())
    return "\n".join(lines).strip("\n") + "\n"


def _host_table(result: HostResult, domain: str) -> Table:
    title = f"{result.host}, steered by {result.small}: bits per byte, lower is better"
    drawn = Table(title=_line(title), box=box.SIMPLE_HEAD, title_justify="left")
    drawn.add_column("row", no_wrap=True)
    for name in (domain, "general text"):
        drawn.add_column(_line(name), justify="right")
        drawn.add_column("against host", justify="right", no_wrap=True)
        drawn.add_column("", no_wrap=True)
    rows = ordered(dict(result.domain) | dict(result.general))
    for row, marks in zip(rows, _marks(result), strict=True):
        cells = [
            *_cells(result.domain, result.domain_change, row),
            marks[0],
            *_cells(result.general, result.general_change, row),
            marks[1],
        ]
        drawn.add_row(_line(row), *cells)
    return drawn


def _marks(result: HostResult) -> list[tuple[str, str]]:
    rows = ordered(dict(result.domain) | dict(result.general))
    domain = worse_rows(result.domain, result.domain_change)
    general = worse_rows(result.general, result.general_change)
    return [(_MARK * (row in domain), _MARK * (row in general)) for row in rows]


def _cells(figures: Figures, paired: Figures, row: str) -> tuple[str, str]:
    figure = figures.get(row)
    if figure is None:
        return "", ""
    return f"{figure.mean:.3f} ± {figure.stderr:.3f}", change_percent(figures, paired, row)


def _line(text: str) -> Text:
    return Text(" ".join(printable(text).split()))
