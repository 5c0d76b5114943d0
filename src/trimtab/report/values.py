"""What an evaluation found, as values."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from trimtab.metrics import Estimate

STEERED = (
    *("bytes", "state", "head", "memory", "head+memory"),
    *("live", "live+head", "live+memory", "all"),
)
"""Rows of a host that is steered by the adapter."""

CONTROLS = ("temperature", "bias", "head-shuffled", "memory-shuffled")
"""Rows that show what remains when the part that should matter is taken away."""

ROWS = (
    *("host", "reference", "expert", "proxy", "bias"),
    *("bytes", "state", "head", "memory", "head+memory", "live", "all"),
    *("head-shuffled", "memory-shuffled"),
)
"""Rows that are measured unless others are asked for, in the order of a table."""

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
        perplexity: The same a token of the host; the standard error is that of the difference
            from the bare host.
    """

    recorded_tokens: int
    bits_per_byte: Figures
    perplexity: Figures


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
        test_tokens: The host's tokens of them; 0 where they were not counted.
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
    test_tokens: int = 0
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
        tokens_row: What steered it: a row.
        completions: Completions before and after; not part of report.json.
        completions_note: How they were written.
        growth: Quality by size of the recording.
        settings: What was set, for the reader; not part of report.json.
    """

    domain: str
    hosts: tuple[HostResult, ...]
    wall_sec: Mapping[str, float]
    adapter_bytes: Mapping[str, int]
    tokens: tuple[TokenChange, ...] = ()
    tokens_name: str = ""
    tokens_row: str = ""
    completions: tuple[Completion, ...] = ()
    completions_note: str = ""
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


def perplexity(result: HostResult) -> dict[str, Estimate]:
    """Perplexity a token of the host on domain text, by row: 2 ^ (bits a byte * bytes a token).

    To first order the standard error is ln 2 * bytes a token * perplexity times that of the bits:
    of the paired difference from the host where there is one. Empty where the tokens were not
    counted.
    """
    if not result.test_tokens:
        return {}
    bytes_per_token = result.test_bytes / result.test_tokens
    found = {}
    for row, figure in result.domain.items():
        value = 2 ** (figure.mean * bytes_per_token)
        error = result.domain_change.get(row, figure).stderr
        found[row] = Estimate(value, math.log(2) * bytes_per_token * value * error)
    return found


SMALLEST_SHARE = 5e-4
"""Of the host's figure: what is shown as 0.0 % is not called worse."""


def worse_rows(figures: Figures, paired: Figures) -> list[str]:
    """Steered rows that are worse than the host by more than one standard error, visibly."""
    found = differences(figures, paired)
    least = SMALLEST_SHARE * figures["host"].mean if "host" in figures else 0.0
    return [
        row for row in STEERED if row in found and found[row].mean > max(found[row].stderr, least)
    ]
