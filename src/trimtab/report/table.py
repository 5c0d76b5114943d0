"""The figures of a report as tables for a terminal. Pure."""

import io

from rich import box
from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from trimtab.report.values import Figures, HostResult, Report, ordered, worse_rows
from trimtab.report.words import change_percent, printable, without_errors

_WIDTH = 100
_MARK = "!"


def table(report: Report) -> str:
    """Draw one table a host for a terminal: bits per byte and change against the host, by row.

    A steered row that is worse than the host by more than one standard error carries a mark.
    """
    parts: list[RenderableType] = [_host_table(result, report.domain) for result in report.hosts]
    if any(_MARK in line for result in report.hosts for line in _marks(result)):
        note = f"{_MARK} steered, and worse than the host by more than one standard error"
        parts.append(Text(f"  {note}"))
    for result in report.hosts:
        lines = without_errors(result, report.domain)
        parts += [Text(f"  {printable(line)}") for line in lines]
    return drawn_text(*parts) + "\n"


def drawn_text(*parts: RenderableType, width: int = _WIDTH) -> str:
    """Tables and lines as plain text, without empty lines around it and spaces at lines' ends.

    Args:
        parts: What stands one below another.
        width: Signs that a line has at most.
    """
    out = io.StringIO()
    console = Console(file=out, width=width, color_system=None, force_terminal=False)
    for part in parts:
        console.print(part)
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines()).strip("\n")


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
