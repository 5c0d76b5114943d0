"""What an evaluation found: values, and their form on disk, report.json (schema 1)."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from trimtab.errors import InputError
from trimtab.metrics import Estimate
from trimtab.store.files import read_json

SCHEMA = 1
"""Version of report.json."""

BASELINES = ("host", "reference", "expert", "proxy")
"""Rows that stand beside the adapter: what there was before, and what it competes with."""

STEERED = ("head", "memory", "head+memory", "live", "all")
"""Rows of a host that is steered by the adapter."""

CONTROLS = ("bias", "head-shuffled", "memory-shuffled")
"""Rows that show what remains when the part that should matter is taken away."""

ROWS = (
    *("host", "reference", "expert", "proxy", "bias", "head", "memory", "head+memory"),
    *("head-shuffled", "memory-shuffled", "live", "all"),
)
"""All rows of a table in their order; rows not measured are absent."""

Figures = Mapping[str, Estimate]
"""One figure in bits per byte for each measured row."""


@dataclass(frozen=True)
class TokenChange:
    """One host token of a held-out file, before and after steering.

    Attributes:
        text: The token's text.
        nats_host: What the token cost the bare host, at least 0.
        nats_steered: What it cost the steered host, at least 0.
        host_top: The bare host's most likely token here.
        steered_top: The steered host's most likely token here.
    """

    text: str
    nats_host: float
    nats_steered: float
    host_top: str
    steered_top: str


@dataclass(frozen=True)
class Completion:
    """One prompt, how it went on in truth, and how the host went on before and after.

    Attributes:
        name: What is completed, for people.
        prompt: The text that was given.
        truth: How the held-out text goes on.
        before: What the bare host wrote.
        after: What the steered host wrote.
    """

    name: str
    prompt: str
    truth: str
    before: str
    after: str


@dataclass(frozen=True)
class GrowthPoint:
    """Quality with a recording of one size.

    Attributes:
        recorded_tokens: Tokens of domain text in the recording.
        bits_per_byte: Domain text, by row.
    """

    recorded_tokens: int
    bits_per_byte: Figures


@dataclass(frozen=True)
class HostResult:
    """All rows of one host.

    Attributes:
        host: The host's name.
        small: The small model's name.
        domain: Held-out domain text, bits per byte by row.
        general: General text pooled over its kinds, bits per byte by row.
        general_kinds: Kind of general text -> row -> bits per byte.
        test_bytes: Bytes of domain text that were scored.
        domain_change: Paired difference row - host on domain text, where it was measured; its
            standard error is much smaller than that of two rows apart.
        general_change: The same on general text.
    """

    host: str
    small: str
    domain: Figures
    general: Figures
    general_kinds: Mapping[str, Figures]
    test_bytes: int
    domain_change: Figures = field(default_factory=dict)
    general_change: Figures = field(default_factory=dict)


@dataclass(frozen=True)
class Report:
    """Everything that the report of one adapter shows.

    Attributes:
        domain: Name of the domain.
        hosts: One result a host.
        wall_sec: Seconds by step.
        adapter_bytes: Size by carrier.
        tokens: A held-out file, token by token; not part of report.json.
        tokens_name: Name of that file.
        completions: Completions before and after; not part of report.json.
        growth: Quality by size of the recording.
        settings: What was set, for the reader; not part of report.json.
    """

    domain: str
    hosts: tuple[HostResult, ...]
    wall_sec: Mapping[str, float]
    adapter_bytes: Mapping[str, int]
    tokens: tuple[TokenChange, ...] = ()
    tokens_name: str = ""
    completions: tuple[Completion, ...] = ()
    growth: tuple[GrowthPoint, ...] = ()
    settings: Mapping[str, str] = field(default_factory=dict)


def ordered(figures: Figures) -> list[str]:
    """Rows that were measured, in the order of ROWS; rows of other names follow by name."""
    return [row for row in ROWS if row in figures] + sorted(set(figures) - set(ROWS))


def differences(figures: Figures, paired: Figures) -> dict[str, Estimate]:
    """Difference of each row from the host in bits per byte; empty without a host row.

    Args:
        figures: Bits per byte by row.
        paired: Paired differences; a row that is missing here gets its own standard error, which
            is wider, because what the documents have in common does not cancel.
    """
    host = figures.get("host")
    if host is None:
        return {}
    apart = {
        row: Estimate(figure.mean - host.mean, figure.stderr)
        for row, figure in figures.items()
        if row != "host"
    }
    return apart | {row: paired[row] for row in apart if row in paired}


def worse_rows(figures: Figures, paired: Figures) -> list[str]:
    """Steered rows that are worse than the host by more than one standard error."""
    found = differences(figures, paired)
    return [row for row in STEERED if row in found and found[row].mean > found[row].stderr]


def report_json(report: Report) -> dict[str, Any]:
    """Give the content of report.json, schema 1.

    Keys that schema 1 does not name (general_kinds, domain_change, general_change of a host, and
    growth) are there only if there is something to say.
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
    general_kinds: dict[str, _FigureTable] = {}
    domain_change: _FigureTable = {}
    general_change: _FigureTable = {}


class _Growth(_Part):
    recorded_tokens: int = Field(ge=0)
    bits_per_byte: _FigureTable


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
    growth = (GrowthPoint(p.recorded_tokens, _figures(p.bits_per_byte)) for p in file.growth)
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
        domain_change=_figures(host.domain_change),
        general_change=_figures(host.general_change),
    )


def _figures(table: _FigureTable) -> dict[str, Estimate]:
    return {row: Estimate(figure.mean, figure.stderr) for row, figure in table.items()}
