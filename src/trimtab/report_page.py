"""The report as one HTML file that loads nothing from anywhere. Pure but for its style sheet."""

from collections.abc import Iterable, Sequence
from html import escape
from importlib import resources

from trimtab.report_plots import bars_svg, growth_svg
from trimtab.report_tokens import tokens_section
from trimtab.report_values import (
    CONTROLS,
    STEERED,
    Completion,
    Figures,
    GrowthPoint,
    HostResult,
    Report,
    ordered,
    worse_rows,
)
from trimtab.report_words import (
    ROW_WORDS,
    change_percent,
    data_size,
    duration,
    printable,
    summary,
    warnings,
)

_MEANING = (
    "Bits per byte say how many bits a model needs to tell one byte of text that it has not seen: "
    "lower is better. ± is one standard error over documents."
)


def page(report: Report) -> str:
    """Render a report as a self-contained HTML page, light and dark, for screens of any width.

    All text of the report is escaped; nothing is loaded, and nothing but colours and the token
    inspector depends on a script or a style.
    """
    sections = [
        *(_host_section(report, number) for number in range(len(report.hosts))),
        tokens_section(report.tokens, report.tokens_name),
        _completions_section(report.completions),
        _growth_section(report.growth),
        _cost_section(report),
        _settings_section(report),
    ]
    title = f"What the adapter did for {_text(report.domain)}"
    hosts = _text(", ".join(dict.fromkeys(result.host for result in report.hosts)))
    return "\n".join(
        (
            "<!DOCTYPE html>",
            '<html lang="en"><head><meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            '<meta name="color-scheme" content="light dark">',
            f"<title>{title}</title>",
            f"<style>\n{_data('report.css')}</style></head>",
            f'<body><main><h1>{title}</h1><p class="kicker">Trimtab report · on {hosts}</p>',
            *(section for section in sections if section),
            "<footer>Written by Trimtab. The same figures for programs: report.json.</footer>",
            f"</main><script>\n{_data('report.js')}</script></body></html>\n",
        )
    )


def _data(name: str) -> str:
    return (resources.files("trimtab") / "data" / name).read_text(encoding="utf-8")


def _text(text: str) -> str:
    return escape(printable(text))


def _host_section(report: Report, number: int) -> str:
    result = report.hosts[number]
    heading = f"<h2>{_text(result.host)}</h2>" if len(report.hosts) > 1 else ""
    warned = "".join(
        f'<p class="warn">{_text(line)}</p>' for line in warnings(result, report.domain)
    )
    return (
        f'<section aria-label="{_text(result.host)}">{heading}'
        f'<p class="lead">{_text(" ".join(summary(result, report.domain)))}</p>{warned}'
        f'<p class="note">{_MEANING}</p>'
        f"{_bars(result, report.domain, number)}{_table(result, report.domain)}"
        f"{_kinds(result)}</section>"
    )


def _bars(result: HostResult, domain: str, number: int) -> str:
    plots = (
        (f"{domain} text", result.domain, result.domain_change, f"domain{number}"),
        ("General text", result.general, result.general_change, f"general{number}"),
    )
    drawn = "".join(_bar_figure(*plot) for plot in plots if plot[1])
    if not drawn:
        return ""
    key = "".join(
        f'<li><i class="is-{name}"></i>{words}</li>'
        for name, words in (
            ("steered", "steered by the adapter"),
            ("baseline", "for comparison"),
            ("control", "controls, which should not help"),
        )
    )
    return (
        f'<h2>Every row against the host</h2><ul class="key">{key}</ul>'
        f'<div class="pair">{drawn}</div>'
    )


def _bar_figure(label: str, figures: Figures, paired: Figures, name: str) -> str:
    alt = f"Bar chart, {label}, bits per byte: " + "; ".join(
        f"{row} {figures[row].mean:.3f} {change_percent(figures, paired, row)}".strip()
        for row in ordered(figures)
    )
    error = "of the difference from the host" if paired else "of the row over documents"
    return (
        f'<figure class="plot"><h3>{_text(label[:1].upper() + label[1:])}</h3>'
        f'<div role="img" aria-label="{_text(alt)}">{bars_svg(figures, paired, name)}</div>'
        f"<figcaption>Bars start at the host (dashed): to the left is better. "
        f"Whiskers: one standard error {error}.</figcaption></figure>"
    )


def _scroll(table: str, label: str) -> str:
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{_text(label)}">{table}</div>'
    )


def _table(result: HostResult, domain: str) -> str:
    rows = ordered(dict(result.domain) | dict(result.general))
    groups = (
        ("For comparison", [row for row in rows if row not in (*STEERED, *CONTROLS)]),
        ("Steered by the adapter", [row for row in rows if row in STEERED]),
        ("Controls", [row for row in rows if row in CONTROLS]),
    )
    bodies = "".join(
        f'<tbody><tr><th scope="rowgroup" colspan="5">{name}</th></tr>'
        + "".join(_row(result, row) for row in group)
        + "</tbody>"
        for name, group in groups
        if group
    )
    head = "".join(
        f'<th scope="col">{words}</th>'
        for words in ("row", _text(domain), "against host", "general text", "against host")
    )
    caption = f"Bits per byte on {result.test_bytes:,} bytes of held-out {_text(domain)} text"
    table = (
        f'<table class="figures"><caption>{caption}, and on general text.</caption>'
        f"<thead><tr>{head}</tr></thead>{bodies}</table>"
    )
    return f"<h2>The figures</h2>{_scroll(table, 'Figures of every row')}"


def _row(result: HostResult, row: str) -> str:
    words = f"<small>{_text(ROW_WORDS[row])}</small>" if row in ROW_WORDS else ""
    cells = _cells(result.domain, result.domain_change, row)
    cells += _cells(result.general, result.general_change, row)
    mark = ' class="host"' if row == "host" else ""
    return f'<tr{mark}><th scope="row">{_text(row)}{words}</th>{cells}</tr>'


def _cells(figures: Figures, paired: Figures, row: str) -> str:
    figure = figures.get(row)
    if figure is None:
        return "<td></td><td></td>"
    return (
        f"<td>{figure.mean:.3f} <small>± {figure.stderr:.3f}</small></td>"
        f"{_change_cell(figures, paired, row)}"
    )


def _change_cell(figures: Figures, paired: Figures, row: str) -> str:
    best = min((figures[name].mean, name) for name in ordered(figures))[1]
    worse = row in worse_rows(figures, paired)
    name = ' class="worse"' if worse else ' class="best"' if row == best != "host" else ""
    percent, plus, error = change_percent(figures, paired, row).partition(" ± ")
    small = f" <small>± {error}</small>" if plus else ""
    return f"<td{name}>{percent}{small}{' worse' if worse else ''}</td>"


def _kinds(result: HostResult) -> str:
    kinds = {kind: figures for kind, figures in result.general_kinds.items() if figures}
    if not kinds:
        return ""
    rows = ordered({row: figure for figures in kinds.values() for row, figure in figures.items()})
    head = "".join(f'<th scope="col" colspan="2">{_text(kind)}</th>' for kind in kinds)
    body = "".join(
        f'<tr{" class=host" if row == "host" else ""}><th scope="row">{_text(row)}</th>'
        + "".join(_cells(figures, {}, row) for figures in kinds.values())
        + "</tr>"
        for row in rows
    )
    table = (
        "<table class='figures'><caption>Bits per byte, and change against the host; pooled, each "
        f"kind counts the same.</caption><thead><tr><th scope='col'>row</th>{head}</tr></thead>"
        f"<tbody>{body}</tbody></table>"
    )
    return f"<h2>General text, kind by kind</h2>{_scroll(table, 'General text by kind')}"


def _completions_section(completions: Sequence[Completion]) -> str:
    if not completions:
        return ""
    return "<section><h2>Completions before and after</h2>" + (
        "".join(_completion(completion) for completion in completions) + "</section>"
    )


def _completion(completion: Completion) -> str:
    panels = (
        ("", "Before: the host alone", completion.before),
        ("after", "After: with the adapter", completion.after),
        ("", "The truth", completion.truth),
    )
    columns = "".join(
        f'<section class="{name}"><h4>{words}</h4>{_pre(text, words)}</section>'
        for name, words, text in panels
    )
    return (
        f"<h3>{_text(completion.name)}</h3><details><summary>The prompt</summary>"
        f'{_pre(completion.prompt, "Prompt", "prompt")}</details><div class="three">{columns}</div>'
    )


def _pre(text: str, label: str, name: str = "plain") -> str:
    # A parser drops one line break right after <pre>; this one is there to be dropped.
    return (
        f'<pre class="{name}" tabindex="0" role="region" aria-label="{_text(label)}">'
        f"\n{_text(text)}</pre>"
    )


def _growth_section(points: Sequence[GrowthPoint]) -> str:
    points = sorted(
        (point for point in points if point.bits_per_byte), key=lambda point: point.recorded_tokens
    )
    if not points:
        return ""
    rows = ordered({row: figure for point in points for row, figure in point.bits_per_byte.items()})
    head = "".join(f'<th scope="col">{point.recorded_tokens:,}</th>' for point in points)
    body = "".join(
        f'<tr><th scope="row">{_text(row)}</th>'
        + "".join(_figure_cell(point.bits_per_byte, row) for point in points)
        + "</tr>"
        for row in rows
    )
    table = (
        "<table><thead><tr><th scope='col'>recorded tokens</th>"
        f"{head}</tr></thead><tbody>{body}</tbody></table>"
    )
    alt = "Line chart of bits per byte against recorded tokens; the figures follow as a table."
    return (
        "<section><h2>How much text it takes</h2><figure class='plot'>"
        f'<div role="img" aria-label="{alt}">{growth_svg(points, "growth")}</div>'
        "<figcaption>Domain text, after a recording of each size. Bars: one standard error."
        f"</figcaption></figure><details><summary>The figures</summary>"
        f"{_scroll(table, 'Bits per byte by size of the recording')}</details></section>"
    )


def _figure_cell(figures: Figures, row: str) -> str:
    figure = figures.get(row)
    if figure is None:
        return "<td></td>"
    return f"<td>{figure.mean:.3f} <small>± {figure.stderr:.3f}</small></td>"


def _cost_section(report: Report) -> str:
    total = sum(report.wall_sec.values())
    times = [(step, seconds, duration(seconds)) for step, seconds in report.wall_sec.items()]
    sizes = [(name, count, data_size(count)) for name, count in report.adapter_bytes.items()]
    tables = _meters("step", f"Time by the clock: {duration(total)} in all.", times)
    tables += _meters("carrier", "Size of the adapter on disk.", sizes)
    if not tables:
        return ""
    return f'<section><h2>What it took</h2><div class="pair">{tables}</div></section>'


def _meters(noun: str, caption: str, entries: Sequence[tuple[str, float, str]]) -> str:
    if not entries:
        return ""
    most = max(max(value for _, value, _ in entries), 1e-9)
    body = "".join(
        f'<tr><th scope="row">{_text(name)}</th><td>{words}</td>'
        f'<td class="meter"><i style="width:{100 * value / most:.1f}%"></i></td></tr>'
        for name, value, words in entries
    )
    head = f"<tr><th scope='col'>{noun}</th><th scope='col'>total</th><td></td></tr>"
    table = f"<table><caption>{caption}</caption><thead>{head}</thead><tbody>{body}</tbody></table>"
    return f"<div>{_scroll(table, caption)}</div>"


def _settings_section(report: Report) -> str:
    if not report.settings:
        return ""
    body = _join(
        f'<tr><th scope="row">{_text(key)}</th><td class="wrap">{_text(value)}</td></tr>'
        for key, value in report.settings.items()
    )
    table = f"<table><tbody>{body}</tbody></table>"
    return f"<section><h2>Settings</h2>{_scroll(table, 'Settings')}</section>"


def _join(parts: Iterable[str]) -> str:
    return "".join(parts)
