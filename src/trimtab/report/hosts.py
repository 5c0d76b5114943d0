"""The part of the page that is about one host: words, bars and tables. Pure."""

from trimtab.report.html import scroll_html, sentence_html, text_html
from trimtab.report.plots import bars_svg
from trimtab.report.values import (
    CONTROLS,
    STEERED,
    Figures,
    HostResult,
    Report,
    ordered,
    worse_rows,
)
from trimtab.report.words import (
    ROW_WORDS,
    change_percent,
    comparison,
    headlines,
    summary,
    warnings,
)

_MEANING = (
    "Bits per byte say how many bits a model needs to tell one byte of text that it has not seen: "
    "lower is better. ± is one standard error over documents. The reference is the small model "
    "before it was tuned, the expert after; proxy tuning adds their difference to the host. The "
    "map reads the host’s states in the small model’s space; controls do without, or shuffle it."
)


def host_section(report: Report, number: int) -> str:
    """Render what was measured on one host.

    Args:
        report: The report.
        number: Place of the host in it; keeps the ids of its plots apart.
    """
    result, domain = report.hosts[number], report.domain
    words = comparison(result)
    compared = f"<p>{sentence_html(words)}</p>" if words else ""
    quiet = ' class="hidden"' if len(report.hosts) == 1 else ""
    warned = "".join(
        f'<p class="warn">{sentence_html(line)}</p>' for line in warnings(result, domain)
    )
    return (
        f"<section><h2{quiet}>On {text_html(result.host)}</h2>"
        f'<p class="lead">{sentence_html(summary(result, domain))}</p>'
        f"{_tiles(result, domain)}{compared}{warned}"
        f'<p class="note">{_MEANING}</p>'
        f"{_bars(result, domain, number)}{_table(result, domain)}{_kinds(result)}</section>"
    )


def _tiles(result: HostResult, domain: str) -> str:
    tiles = "".join(
        f"<li><b>{sentence_html(change)}</b> {text_html(words)}</li>"
        for change, words in headlines(result, domain)
    )
    return f'<ul class="tiles">{tiles}</ul>' if tiles else ""


def _bars(result: HostResult, domain: str, number: int) -> str:
    plots = (
        (f"{domain} text", result.domain, result.domain_change, f"domain{number}"),
        ("General text", result.general, result.general_change, f"general{number}"),
    )
    drawn = "".join(_bar_figure(*plot) for plot in plots if plot[1])
    if not drawn:
        return ""
    paired = "of the difference from the host; the host’s own: over documents"
    error = paired if result.domain_change else "of each row over documents"
    key = "".join(
        f'<li><i class="is-{name}"></i>{words}</li>'
        for name, words in (
            ("steered", "steered by the adapter"),
            ("baseline", "for comparison"),
            ("control", "controls, which need no adapter or no map"),
        )
    )
    return (
        f'<h3 class="part">Every row against the host</h3><ul class="key">{key}</ul>'
        f'<div class="pair">{drawn}</div><p class="note">Bars start at the host (dashed line): to '
        f"the left is better. Whiskers: one standard error, {error}.</p>"
    )


def _bar_figure(label: str, figures: Figures, paired: Figures, name: str) -> str:
    alt = f"Bar chart, {label}, bits per byte: " + "; ".join(
        f"{row} {figures[row].mean:.3f} {change_percent(figures, paired, row)}".strip()
        for row in ordered(figures)
    )
    heading = text_html(label[:1].upper() + label[1:])
    return (
        f'<figure class="plot"><h4>{heading}</h4>'
        f'<div role="img" aria-label="{text_html(alt)}">{bars_svg(figures, paired, name)}</div>'
        "</figure>"
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
        for words in ("row", text_html(domain), "against host", "general text", "against host")
    )
    caption = f"Bits per byte on {result.test_bytes:,} bytes of held-out {text_html(domain)} text"
    table = (
        f'<table class="figures"><caption>{caption}, and on general text.</caption>'
        f"<thead><tr>{head}</tr></thead>{bodies}</table>"
    )
    return f"<h3 class='part'>The figures</h3>{scroll_html(table, 'Figures of every row')}"


def _row(result: HostResult, row: str) -> str:
    words = f"<small>{text_html(ROW_WORDS[row])}</small>" if row in ROW_WORDS else ""
    cells = _cells(result.domain, result.domain_change, row)
    cells += _cells(result.general, result.general_change, row)
    mark = ' class="host"' if row == "host" else ""
    return f'<tr{mark}><th scope="row">{text_html(row)}{words}</th>{cells}</tr>'


def _cells(figures: Figures, paired: Figures, row: str) -> str:
    figure = figures.get(row)
    if figure is None:
        return "<td></td><td></td>"
    return (
        f"<td>{figure.mean:.3f} <small>± {figure.stderr:.3f}</small></td>"
        f"{_change_cell(figures, paired, row)}"
    )


def _change_cell(figures: Figures, paired: Figures, row: str) -> str:
    best = min(ordered(figures), key=lambda name: figures[name].mean)
    worse = row in worse_rows(figures, paired)
    name = ' class="worse"' if worse else ' class="best"' if row == best and row in STEERED else ""
    percent, plus, error = change_percent(figures, paired, row).partition(" ± ")
    small = f" <small>± {error}</small>" if plus else ""
    return f"<td{name}>{percent}{small}{' worse' if worse else ''}</td>"


def _kinds(result: HostResult) -> str:
    kinds = {kind: figures for kind, figures in result.general_kinds.items() if figures}
    if not kinds:
        return ""
    rows = ordered({row: figure for figures in kinds.values() for row, figure in figures.items()})
    head = "".join(f'<th scope="col" colspan="2">{text_html(kind)}</th>' for kind in kinds)
    body = "".join(
        f'<tr{" class=host" if row == "host" else ""}><th scope="row">{text_html(row)}</th>'
        + "".join(_cells(figures, {}, row) for figures in kinds.values())
        + "</tr>"
        for row in rows
    )
    table = (
        "<table class='figures'><caption>Bits per byte, and change against the host; pooled, each "
        f"kind counts the same.</caption><thead><tr><th scope='col'>row</th>{head}</tr></thead>"
        f"<tbody>{body}</tbody></table>"
    )
    framed = scroll_html(table, "General text by kind")
    return f"<h3 class='part'>General text, kind by kind</h3>{framed}"
