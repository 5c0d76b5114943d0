"""A comparison as one HTML file that loads nothing from anywhere. Pure but for its style sheet."""

from collections.abc import Sequence

from trimtab.comparing.figures import MethodFigures, advantage, pareto, quality, quality_of
from trimtab.comparing.kept import FOLDER, STEPS
from trimtab.comparing.table import notes, parts
from trimtab.comparing.words import METHOD_WORDS
from trimtab.metrics import Estimate
from trimtab.report.html import page_html, scroll_html, sentence_html, text_html
from trimtab.report.plots import Point, scatter_svg


def page(
    rows: Sequence[MethodFigures],
    title: str,
    verdict: str,
    better: Sequence[tuple[str, str, float]],
    price: float | None,
) -> str:
    """Render a comparison, light and dark, for screens of any width.

    Args:
        rows: All methods.
        title: Its heading.
        verdict: What it says in words.
        better: Pairs of methods, the first ahead of the second in this share of resamples.
        price: US dollars for an hour of the machine, or None.
    """
    sections = [
        f'<p class="lead">{sentence_html(verdict)}</p>',
        _table_section(rows, price),
        _cost_section(rows),
        _loss_section(rows),
        _better_section(better),
        _files_section(rows),
    ]
    return page_html(title, sections, "Written by Trimtab.")


def _table_section(rows: Sequence[MethodFigures], price: float | None) -> str:
    titles = ("What each method is worth", "What each method costs")
    tables = (
        f"<h2>{title}</h2>{scroll_html(_table(*part, with_words=title == titles[0]), title)}"
        for title, part in zip(titles, parts(rows, price), strict=False)
    )
    said = "".join(f"<li>{text_html(note)}</li>" for note in notes(rows))
    return f'<section>{"".join(tables)}<ul class="note">{said}</ul></section>'


def _table(names: Sequence[str], lines: Sequence[Sequence[str]], *, with_words: bool) -> str:
    head = "".join(f'<th scope="col">{text_html(name)}</th>' for name in names)
    drawn = []
    for line in lines:
        words = METHOD_WORDS.get(line[0], "") if with_words else ""
        small = f"<small>{text_html(words)}</small>" if words else ""
        first = f'<th scope="row">{text_html(line[0])}{small}</th>'
        rest = "".join(f"<td>{sentence_html(cell)}</td>" for cell in line[1:])
        drawn.append(f"<tr>{first}{rest}</tr>")
    return (
        f'<table class="figures"><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(drawn)}</tbody></table>"
    )


def _cost_section(rows: Sequence[MethodFigures]) -> str:
    by = quality(rows)
    front = pareto(rows, by, lambda row: row.result.sec)
    points = [
        Point(row.name, row.result.sec, Estimate(value.mean, _error(row, by)), row.name in front)
        for row in rows
        if (value := quality_of(row, by)) is not None
    ]
    words = "Higher is better." if advantage(by) > 0 else "Lower is better."
    alt = f"{by} against device-seconds before use; the figures stand in the table above."
    drawn = scatter_svg(points, ("device-seconds before use", by), "cost", log_x=True)
    return (
        "<section><h2>Quality against cost</h2><figure class='plot'>"
        f'<div role="img" aria-label="{text_html(alt)}">{drawn}</div>'
        f"<figcaption>{words} Filled points are the Pareto front: no other method is better in no"
        " more time before use; what a token costs afterwards is in the table alone. Bars: one"
        " standard error of the difference from the bare host.</figcaption>"
        "</figure></section>"
    )


def _error(row: MethodFigures, by: str) -> float:
    """Of the paired difference from the bare host, which itself has none."""
    change = row.domain_change if by == "bits per byte" else row.task_change.get(by)
    return 0.0 if change is None else change.stderr


def _loss_section(rows: Sequence[MethodFigures]) -> str:
    points = [
        Point(row.name, row.general_change.mean, row.domain_change, True)
        for row in rows
        if row.domain_change is not None and row.general_change is not None
    ]
    if not points:
        return ""
    names = ("general text, change in bits per byte", "domain text, change in bits per byte")
    alt = "Change on domain text against change on general text, both from the bare host."
    return (
        "<section><h2>Gain against general loss</h2><figure class='plot'>"
        f'<div role="img" aria-label="{alt}">{scatter_svg(points, names, "loss", log_x=False)}'
        "</div><figcaption>Both from the bare host, which is at 0, 0. Further down is better on"
        " the domain; further right is worse on general text. Bars: one standard error on the"
        " domain.</figcaption></figure></section>"
    )


def _better_section(better: Sequence[tuple[str, str, float]]) -> str:
    if not better:
        return ""
    lines = "".join(
        f"<li>{text_html(first)} ahead of {text_html(second)}: {100 * share:.0f} %</li>"
        for first, second, share in better
    )
    return (
        "<section><h2>Which is better than which</h2><p>Share of paired resamples in which a"
        f" method is ahead of the next one in rank.</p><ul>{lines}</ul></section>"
    )


def _files_section(rows: Sequence[MethodFigures]) -> str:
    """Where each figure lies; files are named and not linked, since a page travels alone."""
    lines = []
    for row in rows:
        steps = [f"{STEPS}/{step.name}.json" for step in row.result.steps if not step.is_estimated]
        found = ", ".join(f"<code>{text_html(path)}</code>" for path in steps)
        file = f"<code>{text_html(f'{FOLDER}/{row.name}.json')}</code>"
        lines.append(f"<li>{file}{f', made by {found}' if found else ''}</li>")
    return (
        "<section><h2>Where the figures come from</h2><p>Each lies in a file of the comparison’s"
        " folder: in <code>comparison.json</code> as it stands here, with its standard error; and"
        " below it, by method, the nats and bytes of each document and the answer to each question"
        " from which it follows, and the seconds, operations and memory of each step.</p>"
        f"<ul>{''.join(lines)}</ul></section>"
    )
