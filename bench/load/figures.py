"""What is made of the figures: percentiles, growth, and the table. Pure."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

LEAK_SHARE = 0.03
"""Growth of the memory at rest, over all rounds after the warm-up, that is taken for none."""


def percentiles(values_sec: Sequence[float]) -> dict[str, float]:
    """The 50th, 95th and 99th percentile, and how many values there were."""
    if len(values_sec) < 2:
        return {"count": len(values_sec), **{f"p{p}": sum(values_sec) for p in (50, 95, 99)}}
    cuts = statistics.quantiles(values_sec, n=100, method="inclusive")
    return {"count": len(values_sec), **{f"p{p}": round(cuts[p - 1], 4) for p in (50, 95, 99)}}


def growth(values: Sequence[float]) -> float:
    """How much values grow from the first to the last, by the median of all pairs' slopes.

    Theil and Sen's estimate: a third of the values may be anything, and a leak, which adds as
    much in each round, is seen whole.
    """
    slopes = [
        (values[j] - values[i]) / (j - i)
        for i in range(len(values))
        for j in range(i + 1, len(values))
    ]
    return statistics.median(slopes) * (len(values) - 1) if slopes else 0.0


def leaks(rests: Sequence[Mapping[str, float]], warm_up: int) -> list[str]:
    """What a server holds more and more of, with nothing to do, after rounds of equal load.

    Args:
        rests: What it holds after each round.
        warm_up: Rounds in which it may still grow.
    """
    rss = [rest["rss_bytes"] for rest in rests[warm_up:]]
    found = []
    if len(rss) < 3:
        return ["too few rounds after the warm-up to tell a leak"]
    more = growth(rss)
    if more > LEAK_SHARE * rss[0]:
        found.append(f"the memory grew by {more / 1e6:.1f} MB in {len(rss) - 1} rounds")
    for name in ("descriptors", "threads"):
        if growth([rest[name] for rest in rests[warm_up:]]) >= 1:
            found.append(f"{name} grew: {[rest[name] for rest in rests]}")
    return found


def table(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    """A report in few lines."""
    rows = [("requests", f"{report['requests']}, {report['clients']} clients at once")]
    rows += [(name, str(count)) for name, count in sorted(report["outcomes"].items())]
    for name, meaning in (
        ("first_sec", "first piece"),
        ("whole_sec", "whole answer"),
        ("waited_sec", "whole answer, with the waiting that 429 asks for"),
    ):
        found = report["latency"][name]
        said = "  ".join(f"p{p} {found[f'p{p}']:.2f} s" for p in (50, 95, 99))
        rows.append((meaning, said))
    rests = [f"{rest['rss_bytes'] / 1e6:.0f}" for rest in report["rests"]]
    rows.append(("memory after each round, MB", " ".join(rests)))
    rows.append(("adapters exchanged", str(report["swaps"])))
    rows.append(("malformed requests", str(report["malformed"]["sent"])))
    fuzz = report["schemathesis"]
    rows.append(("schemathesis", f"{fuzz['cases']} cases, {len(fuzz['failures'])} failures"))
    if "restart_sec" in report:
        rows.append(("restart after kill -9", f"{report['restart_sec']:.1f} s"))
    faults = report["faults"]
    rows.append(("verdict", "held" if not faults else f"{len(faults)} faults"))
    return rows
