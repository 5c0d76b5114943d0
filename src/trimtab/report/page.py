"""The report as one HTML file that loads nothing from anywhere. Pure but for its style sheet."""

from collections.abc import Sequence

from trimtab.report.hosts import host_section
from trimtab.report.html import data_text, page_html, pre_html, scroll_html, text_html
from trimtab.report.plots import growth_svg
from trimtab.report.tokens import tokens_section
from trimtab.report.values import Completion, Figures, GrowthPoint, Report, ordered
from trimtab.report.words import data_size, duration


def page(report: Report) -> str:
    """Render a report as a self-contained HTML page, light and dark, for screens of any width.

    All text of the report is escaped; nothing is loaded, and nothing but colours and the token
    inspector depends on a script or a style.
    """
    hosts = text_html(", ".join(dict.fromkeys(result.host for result in report.hosts)))
    parts = [
        f'<p class="kicker">Trimtab report · on {hosts}</p>',
        *(host_section(report, number) for number in range(len(report.hosts))),
        tokens_section(report.tokens, report.tokens_name, report.tokens_row),
        _completions_section(report.completions, report.completions_note),
        _growth_section(report.growth),
        _cost_section(report),
        _settings_section(report),
    ]
    return page_html(
        f"What the adapter did for {report.domain}",
        parts,
        "Written by Trimtab. The same figures for programs: report.json.",
        f"<script>\n{data_text('report.js')}</script>",
    )


def _completions_section(completions: Sequence[Completion], note: str) -> str:
    if not completions:
        return ""
    said = f'<p class="note">{text_html(note)}</p>' if note else ""
    return f"<section><h2>Completions before and after</h2>{said}" + (
        "".join(_completion(completion) for completion in completions) + "</section>"
    )


def _completion(completion: Completion) -> str:
    panels = (
        ("", "Before: the host alone", completion.before),
        ("after", "After: with the adapter", completion.after),
        ("", "The truth", completion.truth),
    )
    columns = "".join(
        f'<section class="{name}"><h4>{words}</h4>{pre_html(text, words)}</section>'
        for name, words, text in panels
    )
    prompt = pre_html(completion.prompt, "Prompt", "prompt")
    return (
        f"<h3>{text_html(completion.name)}</h3><details><summary>The prompt</summary>"
        f'{prompt}</details><div class="three">{columns}</div>'
    )


def _growth_section(points: Sequence[GrowthPoint]) -> str:
    points = sorted(
        (point for point in points if point.perplexity), key=lambda point: point.recorded_tokens
    )
    if not points:
        return ""
    rows = ordered({row: figure for point in points for row, figure in point.perplexity.items()})
    head = "".join(f'<th scope="col">{point.recorded_tokens:,}</th>' for point in points)
    body = "".join(
        f'<tr><th scope="row">{text_html(row)}</th>'
        + "".join(_figure_cell(point.perplexity, row) for point in points)
        + "</tr>"
        for row in rows
    )
    table = (
        "<table><thead><tr><th scope='col'>recorded tokens</th>"
        f"{head}</tr></thead><tbody>{body}</tbody></table>"
    )
    alt = "Line chart of perplexity against recorded tokens; the figures follow as a table."
    return (
        "<section><h2>How much text it takes</h2><figure class='plot'>"
        f'<div role="img" aria-label="{alt}">{growth_svg(points, "growth")}</div>'
        "<figcaption>Perplexity: among how many equally likely tokens the host seems to choose,"
        " lower is better; of the memory alone, on part of the domain text,"
        " after a recording of each size; with nothing recorded it is that of the bare host. Bars:"
        " one standard error of the difference from the bare host."
        f"</figcaption></figure><details><summary>The figures</summary>"
        f"{scroll_html(table, 'Perplexity by size of the recording')}</details></section>"
    )


def _figure_cell(figures: Figures, row: str) -> str:
    figure = figures.get(row)
    if figure is None:
        return "<td></td>"
    return f"<td>{figure.mean:.2f} <small>± {figure.stderr:.2f}</small></td>"


def _cost_section(report: Report) -> str:
    total = sum(report.wall_sec.values())
    times = [(step, seconds, duration(seconds)) for step, seconds in report.wall_sec.items()]
    sizes = [(name, count, data_size(count)) for name, count in report.adapter_bytes.items()]
    tables = _meters(("step", "time"), f"Time by the clock: {duration(total)} in all.", times)
    tables += _meters(
        ("carrier", "size"),
        "Size of each carrier on disk; mount.safetensors, which all share, is not counted.",
        sizes,
    )
    if not tables:
        return ""
    return f'<section><h2>What it took</h2><div class="pair">{tables}</div></section>'


def _meters(names: tuple[str, str], caption: str, entries: Sequence[tuple[str, float, str]]) -> str:
    if not entries:
        return ""
    most = max(max(value for _, value, _ in entries), 1e-9)
    body = "".join(
        f'<tr><th scope="row">{text_html(name)}</th><td>{words}</td>'
        f'<td class="meter"><i style="width:{100 * value / most:.1f}%"></i></td></tr>'
        for name, value, words in entries
    )
    head = f"<tr><th scope='col'>{names[0]}</th><th scope='col'>{names[1]}</th><td></td></tr>"
    table = f"<table><caption>{caption}</caption><thead>{head}</thead><tbody>{body}</tbody></table>"
    return f"<div>{scroll_html(table, caption)}</div>"


def _settings_section(report: Report) -> str:
    if not report.settings:
        return ""
    body = "".join(
        f'<tr><th scope="row">{text_html(key)}</th><td class="wrap">{text_html(value)}</td></tr>'
        for key, value in report.settings.items()
    )
    table = f"<table><tbody>{body}</tbody></table>"
    return f"<section><h2>Settings</h2>{scroll_html(table, 'Settings')}</section>"
