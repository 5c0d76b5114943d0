"""Several hosts of one adapter in one report. Pure."""

from collections.abc import Iterable, Mapping, Sequence

from trimtab.errors import InputError
from trimtab.report.values import Report


def merge_hosts(reports: Sequence[Report]) -> Report:
    """Join reports of one adapter on several hosts into one.

    Tokens, completions and growth are those of the first report that has them.

    Raises:
        InputError: No report, different domains, different adapters, or a host twice.
    """
    _refuse_unlike(reports)
    with_tokens = next((report for report in reports if report.tokens), reports[0])
    completed = next((report for report in reports if report.completions), reports[0])
    return Report(
        domain=reports[0].domain,
        hosts=tuple(result for report in reports for result in report.hosts),
        wall_sec=_joined_sec(report.wall_sec for report in reports),
        adapter_bytes=reports[0].adapter_bytes,
        tokens=with_tokens.tokens,
        tokens_name=with_tokens.tokens_name,
        tokens_row=with_tokens.tokens_row,
        completions=completed.completions,
        completions_note=completed.completions_note,
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
