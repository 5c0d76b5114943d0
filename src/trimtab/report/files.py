"""The report on disk: report.json (schema 1) and report.html."""

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from trimtab.errors import InputError
from trimtab.metrics import Estimate
from trimtab.report.page import page
from trimtab.report.values import Figures, GrowthPoint, HostResult, Report, ordered
from trimtab.store.files import read_json, write_atomic, write_json

SCHEMA = 1
"""Version of report.json."""


def write_report(report: Report, folder: Path) -> None:
    """Write report.json and report.html into a folder, each whole or not at all.

    Raises:
        NumericalError: A figure is not a finite number; nothing is written.
        StorageError: The disk is full or the folder cannot be written.
    """
    write_json(folder / "report.json", report_json(report))
    write_atomic(folder / "report.html", page(report).encode())


def report_json(report: Report) -> dict[str, Any]:
    """Give the content of report.json, schema 1.

    Keys that schema 1 does not name (general_kinds, domain_change, general_change and test_tokens
    of a host, and growth) are there only if there is something to say.
    """
    content: dict[str, Any] = {
        "schema": SCHEMA,
        "domain": report.domain,
        "hosts": [_host_json(result) for result in report.hosts],
        "wall_sec": dict(report.wall_sec),
        "adapter_bytes": dict(report.adapter_bytes),
    }
    if report.growth:
        content["growth"] = [
            {
                "recorded_tokens": point.recorded_tokens,
                "bits_per_byte": _figures_json(point.bits_per_byte),
                "perplexity": _figures_json(point.perplexity),
            }
            for point in report.growth
        ]
    return content


def _host_json(result: HostResult) -> dict[str, Any]:
    further = {
        "general_kinds": {
            kind: _figures_json(figures) for kind, figures in result.general_kinds.items()
        },
        "domain_change": _figures_json(result.domain_change),
        "general_change": _figures_json(result.general_change),
        "test_tokens": result.test_tokens,
    }
    return {
        "host": result.host,
        "small": result.small,
        "domain_bits_per_byte": _figures_json(result.domain),
        "general_bits_per_byte": _figures_json(result.general),
        "test_bytes": result.test_bytes,
    } | {key: value for key, value in further.items() if value}


def _figures_json(figures: Figures) -> dict[str, dict[str, float]]:
    return {
        row: {"mean": figures[row].mean, "stderr": figures[row].stderr} for row in ordered(figures)
    }


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class _Figure(_Part):
    mean: float
    stderr: float = Field(ge=0)


_FigureTable = dict[str, _Figure]


class _Host(_Part):
    host: str
    small: str
    domain_bits_per_byte: _FigureTable
    general_bits_per_byte: _FigureTable
    test_bytes: int = Field(ge=0)
    test_tokens: int = Field(default=0, ge=0)
    general_kinds: dict[str, _FigureTable] = {}
    domain_change: _FigureTable = {}
    general_change: _FigureTable = {}


class _Growth(_Part):
    recorded_tokens: int = Field(ge=0)
    bits_per_byte: _FigureTable
    perplexity: _FigureTable = {}


class _File(_Part):
    version: Literal[1] = Field(alias="schema")
    domain: str
    hosts: list[_Host]
    wall_sec: dict[str, float]
    adapter_bytes: dict[str, int]
    growth: list[_Growth] = []


def read_report(path: Path) -> Report:
    """Read report.json; tokens, completions and settings are not in it and come back empty.

    Args:
        path: The file, or the folder that holds it.

    Raises:
        InputError: No such file, not JSON, another schema, an unknown or missing key.
    """
    path = path / "report.json" if path.is_dir() else path
    content = read_json(path, "report")
    if content.get("schema") != SCHEMA:
        raise InputError(
            f"{path} says schema {content.get('schema')!r}, expected {SCHEMA}",
            hint="read it with the version of Trimtab that wrote it, or evaluate again",
        )
    try:
        return _report(_File.model_validate(content))
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise InputError(
            f"{path} is not a report of schema {SCHEMA}: {place}: {first['msg']}",
            hint="the file was changed; evaluate again to write a new one",
        ) from error


def _report(file: _File) -> Report:
    growth = (
        GrowthPoint(p.recorded_tokens, _figures(p.bits_per_byte), _figures(p.perplexity))
        for p in file.growth
    )
    return Report(
        domain=file.domain,
        hosts=tuple(_host(host) for host in file.hosts),
        wall_sec=file.wall_sec,
        adapter_bytes=file.adapter_bytes,
        growth=tuple(growth),
    )


def _host(host: _Host) -> HostResult:
    return HostResult(
        host=host.host,
        small=host.small,
        domain=_figures(host.domain_bits_per_byte),
        general=_figures(host.general_bits_per_byte),
        general_kinds={kind: _figures(table) for kind, table in host.general_kinds.items()},
        test_bytes=host.test_bytes,
        test_tokens=host.test_tokens,
        domain_change=_figures(host.domain_change),
        general_change=_figures(host.general_change),
    )


def _figures(table: _FigureTable) -> dict[str, Estimate]:
    return {row: Estimate(figure.mean, figure.stderr) for row, figure in table.items()}
