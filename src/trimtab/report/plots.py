"""Plots of the report as inline SVG that follows the page's fonts and colours. Pure."""

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, floor, log10
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from trimtab.metrics import Estimate
from trimtab.report.values import (
    CONTROLS,
    STEERED,
    Figures,
    GrowthPoint,
    differences,
    ordered,
)
from trimtab.report.words import change_percent

# Colours that no plot would choose by itself: each becomes a variable of the page's style sheet,
# so that one picture serves light and dark.
_INK, _MUTED, _RULE = "#010a0b", "#010a0c", "#010a0d"
_STEERED, _BASELINE, _CONTROL = "#010a0e", "#010a0f", "#010a1a"
_SERIES = ("#010b01", "#010b02", "#010b03", "#010b04", "#010b05", "#010b06")
_VARIABLES = {
    _INK: "--ink",
    _MUTED: "--muted",
    _RULE: "--line",
    _STEERED: "--steered",
    _BASELINE: "--baseline",
    _CONTROL: "--control",
    **{colour: f"--series-{number}" for number, colour in enumerate(_SERIES, 1)},
}

# One point is one CSS pixel of a plot that is shown at its own size; a phone shows it a little
# smaller, half a wide page a little larger.
_WIDTH = 410
_ROW = 24
_GAP = 12
_LINE, _LETTER = 13.0, 6.3
"""Height of a line and width of a letter beside a point."""
_SETTINGS: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "trimtab",
    "font.size": 12.5,
    "text.color": _INK,
    "axes.labelcolor": _MUTED,
    "axes.edgecolor": _RULE,
    "xtick.color": _RULE,
    "ytick.color": _RULE,
    "xtick.labelcolor": _MUTED,
    "ytick.labelcolor": _MUTED,
    "axes.unicode_minus": True,
}


def bars_svg(figures: Figures, paired: Figures, name: str) -> str:
    """Draw bars that start at the host's line and end at each row's bits per byte.

    Whiskers are one standard error: of the difference where it was measured pairwise, else of
    the row itself.

    Args:
        figures: Bits per byte by row, at least one.
        paired: Paired differences from the host, by row.
        name: Prefix of the ids in the picture; unique within a page.
    """
    groups = _groups(figures)
    places = _places(groups)
    height = _ROW * len(figures) + _GAP * (len(groups) - 1) + 46
    with rc_context(_SETTINGS):
        figure, axes = _canvas(height, left=122, right=118)
        origin = figures["host"].mean if "host" in figures else 0.0
        axes.axvline(origin, color=_MUTED, linewidth=1, linestyle=(0, (3, 3)), zorder=1)
        for row, place in places.items():
            _bar(axes, place, row, origin, _whisker(figures, paired, row))
            _bar_words(axes, place, row, figures, paired)
        axes.set_ylim(max(places.values()) + 0.7, -0.7)
        axes.set_yticks([])
        axes.set_xlabel("bits per byte, lower is better")
        axes.xaxis.set_major_locator(MaxNLocator(3))
        axes.margins(x=0.08)
        return _svg(figure, name)


def _groups(figures: Figures) -> list[list[str]]:
    rows = ordered(figures)
    apart = (*STEERED, *CONTROLS)
    groups = (
        [row for row in rows if row not in apart],
        [row for row in rows if row in STEERED],
        [row for row in rows if row in CONTROLS],
    )
    return [group for group in groups if group]


def _places(groups: Sequence[Sequence[str]]) -> dict[str, float]:
    places: dict[str, float] = {}
    for number, group in enumerate(groups):
        for row in group:
            places[row] = len(places) + number * _GAP / _ROW
    return places


def _whisker(figures: Figures, paired: Figures, row: str) -> Estimate:
    found = differences(figures, paired).get(row)
    return Estimate(figures[row].mean, figures[row].stderr if found is None else found.stderr)


def _bar(axes: Axes, place: float, row: str, origin: float, figure: Estimate) -> None:
    colour = _STEERED if row in STEERED else _CONTROL if row in CONTROLS else _BASELINE
    hollow = row in CONTROLS
    axes.barh(
        place,
        figure.mean - origin,
        left=origin,
        height=0.62,
        facecolor="none" if hollow else colour,
        edgecolor=colour,
        linewidth=1.2 if hollow else 0,
        linestyle=(0, (2, 2)) if hollow else "-",
        zorder=2,
    )
    axes.errorbar(
        figure.mean,
        place,
        xerr=figure.stderr,
        fmt="o" if row == "host" else "none",
        color=_INK,
        ecolor=_INK,
        elinewidth=1.1,
        capsize=2.5,
        markersize=5,
        zorder=3,
    )


def _bar_words(axes: Axes, place: float, row: str, figures: Figures, paired: Figures) -> None:
    change = change_percent(figures, paired, row).split(" ")[0]
    # The value is read from left to right with its change: 1.213  −5.5 %.
    right = axes.get_yaxis_transform()
    beside: dict[str, Any] = {"va": "center_baseline", "parse_math": False}
    axes.text(-0.04, place, _plain(row), ha="right", transform=right, **beside)
    value = f"{figures[row].mean:.3f}"
    axes.text(1.27, place, value, ha="right", color=_MUTED, transform=right, **beside)
    if change:
        axes.text(1.69, place, f"{change} %", ha="right", transform=right, **beside)


def growth_svg(points: Sequence[GrowthPoint], name: str) -> str:
    """Draw perplexity against the size of the recording, one line a row, with error bars.

    The host, which no recording changes, is a dashed line.

    Args:
        points: At least one.
        name: Prefix of the ids in the picture; unique within a page.
    """
    points = sorted(points, key=lambda point: point.recorded_tokens)
    rows = ordered({row: figure for point in points for row, figure in point.perplexity.items()})
    with rc_context(_SETTINGS):
        figure, axes = _canvas(260, left=52, right=112)
        ends: dict[str, tuple[float, str]] = {}
        series = iter(range(len(rows)))
        for row in rows:
            here = [point for point in points if row in point.perplexity]
            colour = _MUTED if row == "host" else _SERIES[next(series) % len(_SERIES)]
            _line(axes, row, here, colour)
            ends[row] = (here[-1].perplexity[row].mean, colour)
        _size_axis(axes, [point.recorded_tokens for point in points])
        axes.set_ylabel("perplexity")
        axes.yaxis.set_major_locator(MaxNLocator(5))
        _end_labels(axes, ends)
        return _svg(figure, name)


def _line(axes: Axes, row: str, points: Sequence[GrowthPoint], colour: str) -> None:
    host = row == "host"
    axes.errorbar(
        [point.recorded_tokens for point in points],
        [point.perplexity[row].mean for point in points],
        yerr=None if host else [point.perplexity[row].stderr for point in points],
        color=colour,
        linestyle=(0, (4, 3)) if host else "-",
        linewidth=1.2 if host else 1.8,
        marker="" if host else "o",
        markersize=4.5,
        elinewidth=1,
        capsize=2.5,
    )


def _size_axis(axes: Axes, sizes: Sequence[int]) -> None:
    if min(sizes) > 0:
        axes.set_xscale("log")
    ticks = sorted(set(sizes))
    axes.set_xticks(ticks, [_tokens(size) for size in ticks])
    axes.set_xticks([], minor=True)
    axes.set_xlabel("recorded tokens")


def _tokens(count: int) -> str:
    for factor, unit in ((1_000_000, " M"), (1000, " k")):
        if count >= factor:
            return f"{count / factor:.3g}{unit}"
    return str(count)


def _end_labels(axes: Axes, ends: dict[str, tuple[float, str]]) -> None:
    # Labels at the lines' ends, pushed apart to a line's height where the ends meet.
    low, high = axes.get_ylim()
    step = (high - low) * 0.075
    place = float("-inf")
    for row, (value, colour) in sorted(ends.items(), key=lambda end: end[1][0]):
        place = max(value, place + step)
        axes.annotate(
            _plain(row),
            (1.03, place),
            xycoords=axes.get_yaxis_transform(),
            color=colour,
            va="center_baseline",
            annotation_clip=False,
            parse_math=False,
        )


def _canvas(height: float, *, left: float, right: float) -> tuple[Figure, Axes]:
    bottom, top = 40, 6
    figure = Figure(figsize=(_WIDTH / 72, height / 72), dpi=72)
    figure.patch.set_visible(False)
    width_share, height_share = _WIDTH - left - right, height - bottom - top
    axes = figure.add_axes(
        (left / _WIDTH, bottom / height, width_share / _WIDTH, height_share / height)
    )
    axes.patch.set_visible(False)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.tick_params(length=3, width=0.8)
    return figure, axes


def _plain(text: str) -> str:
    # Signs that the drawing font lacks would be warnings, and wrong widths.
    return "".join(sign if " " <= sign <= "~" else "?" for sign in text)


def _svg(figure: Figure, name: str) -> str:
    """Give the bare <svg> element: no prologue, no outside addresses, ids of its own."""
    out = io.StringIO()
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    figure.savefig(out, format="svg", metadata=nothing)
    svg = out.getvalue()
    opening, body = svg[svg.index("<svg") :].split(">", 1)
    box = re.search(r'viewBox="[^"]*"', opening)
    assert box, "matplotlib states the size of a picture"
    # matplotlib's own style sheet and fonts would reach beyond the picture.
    body = re.sub(r"<style.*?</style>|<metadata>.*?</metadata>", "", body, flags=re.DOTALL)
    body = re.sub(r"font-family: [^;]*; ", "", body)
    body = re.sub(r'<g id="[^"]*">', "<g>", body)
    body = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", body)
    for colour, variable in _VARIABLES.items():
        body = body.replace(colour, f"var({variable})")
    return f'<svg aria-hidden="true" focusable="false" {box[0]}>{body.strip()}'


@dataclass(frozen=True)
class Point:
    """A named point.

    Attributes:
        name: What it is.
        x: Its place to the right; a logarithmic axis shows 0 at its left end, and says so.
        y: Its height, with the error that its bar shows.
        is_filled: Whether it is one of those that matter most.
    """

    name: str
    x: float
    y: Estimate
    is_filled: bool


def scatter_svg(
    points: Sequence[Point], axes_names: tuple[str, str], name: str, *, log_x: bool
) -> str:
    """Draw named points with error bars; a line joins the filled ones where the x axis is a cost.

    Args:
        points: At least one.
        axes_names: Words of the x axis and of the y axis.
        name: Prefix of the ids in the picture; unique within a page.
        log_x: Whether the x axis is logarithmic.
    """
    costs = [point.x for point in points if point.x > 0] or [1.0]
    nothing = min(costs) / 10
    with rc_context(_SETTINGS):
        # Room for a sign, four digits and the words that stand upright beside them.
        figure, axes = _canvas(300, left=76, right=92)
        for point in points:
            x = max(point.x, nothing) if log_x else point.x
            axes.errorbar(
                x, point.y.mean, yerr=point.y.stderr or None, fmt="o", markersize=6, capsize=2.5,
                color=_STEERED, ecolor=_MUTED, elinewidth=1,
                markerfacecolor=_STEERED if point.is_filled else "none",
            )  # fmt: skip
        if log_x:
            axes.set_xscale("log")
            front = sorted((p for p in points if p.is_filled), key=lambda p: p.x)
            xs = [max(point.x, nothing) for point in front]
            named = _round_costs(min(costs), max(costs))
            axes.set_xticks([nothing, *named], ["0", *(f"{cost:,g}" for cost in named)])
            axes.set_xticks([], minor=True)
            axes.plot(xs, [p.y.mean for p in front], color=_RULE, linewidth=1, zorder=0)
        else:
            axes.axhline(0, color=_RULE, linewidth=0.8, zorder=0)
            axes.axvline(0, color=_RULE, linewidth=0.8, zorder=0)
        axes.set_xlabel(_plain(axes_names[0]))
        axes.set_ylabel(_plain(axes_names[1]))
        axes.margins(x=0.1, y=0.15)
        _name_points(axes, [(p.name, max(p.x, nothing) if log_x else p.x, p.y) for p in points])
        return _svg(figure, name)


def _round_costs(least: float, most: float) -> list[float]:
    """Powers of ten from the least to the most; twice and five times these where they are few."""
    powers = range(floor(log10(least)), ceil(log10(most)) + 1)
    found = [10.0**power for power in powers if least <= 10.0**power <= most]
    if len(found) > 1:
        return found
    fine = [factor * 10.0**power for power in powers for factor in (1, 2, 5)]
    return [cost for cost in fine if least / 2 <= cost <= 2 * most]


def _name_points(axes: Axes, points: Sequence[tuple[str, float, Estimate]]) -> None:
    """Write names beside points, from above; where two would meet, the lower one moves down."""
    # Limits that could still move would move the points, and not the names.
    axes.set_xlim(axes.get_xlim())
    axes.set_ylim(axes.get_ylim())
    taken: list[tuple[float, float, float]] = []
    places = [(axes.transData.transform((x, y.mean)), name, (x, y.mean)) for name, x, y in points]
    for (left, height), name, point in sorted(places, key=lambda place: -place[0][1]):
        right, level = left + 7 + _LETTER * len(name), height + 4
        while met := [
            other
            for start, end, other in taken
            if start < right and left < end and abs(other - level) < _LINE
        ]:
            level = min(met) - _LINE
        taken.append((left, right, level))
        line = {"arrowstyle": "-", "color": _RULE, "linewidth": 0.8, "shrinkA": 0, "shrinkB": 4}
        axes.annotate(
            _plain(name), point, (7, level - height), textcoords="offset points", fontsize=10.5,
            va="center_baseline", parse_math=False,
            arrowprops=line if height + 4 - level > _LINE else None,
        )  # fmt: skip
