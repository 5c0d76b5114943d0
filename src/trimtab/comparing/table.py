"""The figures of a comparison as a table: for a terminal, for Markdown, and for a page. Pure."""

from collections.abc import Sequence
from textwrap import fill

from rich import box
from rich.table import Table

from trimtab.comparing.figures import BASELINE, GENERAL, MethodFigures, drawn_from
from trimtab.comparing.words import spoken_bits, spoken_change
from trimtab.metrics import Estimate
from trimtab.report.table import drawn_text
from trimtab.report.words import data_size, duration, one_document

ESTIMATED = "~"
"""Before a figure that follows from measured throughput instead of a clock."""

_WIDTH = 120
_BUSY = 0.7
"""Share of the clock's seconds under which processors waited."""
_FIRST_COST = "training FLOPs"


def headings(tasks: Sequence[str], price: float | None) -> list[str]:
    """Names of the columns; those of a task stand where there is one."""
    cost = "$ 1M tokens" if price else "1M tokens"
    return [
        *("method", "domain bits/byte", "against host", *tasks, "general against host"),
        *(_FIRST_COST, "device-seconds", "peak memory", "artefact", cost, "another host"),
    ]


def cells(row: MethodFigures, tasks: Sequence[str], price: float | None) -> list[str]:
    """What the table shows of a method; "" where nothing was measured."""
    result = row.result
    mark = ESTIMATED if result.is_sec_estimated else ""
    # What was not run and has no steps to estimate is not therefore free; a prompt is.
    nothing = "0" if result.status == "measured" or result.further_hosts == "nothing" else ""
    memory = result.peak_bytes
    guessed = ESTIMATED if result.status == "estimated" else ""
    return [
        row.name,
        _figure(row),
        _percent(row, "bits per byte"),
        *(_share(row.task.get(name)) for name in tasks),
        _percent(row, GENERAL),
        f"{mark}{result.flops:.1e}" if result.steps else nothing,
        f"{mark}{duration(result.sec)}" if result.steps else nothing,
        f"{guessed}{data_size(memory)}" if memory else "",
        data_size(result.artefact_bytes) if result.artefact_bytes is not None else "",
        _use(row, price),
        result.further_hosts,
    ]


def usd_per_million(row: MethodFigures, price: float | None) -> float | None:
    """Price of a million generated tokens on this machine, prompts included; None without any."""
    if row.result.use is None or price is None or not row.result.writes_text:
        return None
    return row.result.use.sec_per_token * 1e6 / 3600 * price


def _use(row: MethodFigures, price: float | None) -> str:
    if row.result.use is None or not row.result.writes_text:
        return ""
    usd = usd_per_million(row, price)
    return duration(row.result.use.sec_per_token * 1e6) if usd is None else f"{usd:.2f}"


def _figure(row: MethodFigures) -> str:
    return "" if row.domain is None else spoken_bits(row.domain, drawn_from(row, "bits per byte"))


def _share(value: Estimate | None) -> str:
    return "" if value is None else f"{100 * value.mean:.1f} ± {100 * value.stderr:.1f} %"


def _percent(row: MethodFigures, by: str) -> str:
    change, value = row.domain_change, row.domain
    if by == GENERAL:
        change, value = row.general_change, row.general
    if change is None or value is None:
        return ""
    return spoken_change(change, value.mean - change.mean, drawn_from(row, by))


def body(rows: Sequence[MethodFigures], price: float | None) -> tuple[list[str], list[list[str]]]:
    """Headings and cells, without the columns that nobody fills."""
    tasks = list(dict.fromkeys(name for row in rows for name in row.task))
    names, lines = headings(tasks, price), [cells(row, tasks, price) for row in rows]
    kept = [n for n in range(len(names)) if any(line[n] for line in lines)]
    return [names[n] for n in kept], [[line[n] for n in kept] for line in lines]


def notes(rows: Sequence[MethodFigures]) -> list[str]:
    """What figures mean, why methods were not run, and how the others were."""
    found = [f"{row.name}: {row.result.reason}" for row in rows if row.result.reason]
    found += [f"{row.name}: {row.result.note}" for row in rows if row.result.note]
    found += _waited(rows)
    if any(row.result.is_sec_estimated for row in rows):
        how = "operations and memory from sizes, seconds from the throughput that was measured here"
        found.insert(0, f"{ESTIMATED} estimated: {how}")
    return [*_scored(rows), *_columns(rows), *found]


def _scored(rows: Sequence[MethodFigures]) -> list[str]:
    """From how much text figures and errors follow, the same for all methods."""
    bare = next(row.result for row in rows if row.name == BASELINE)
    kinds = {f"{GENERAL} ({kind})": scores for kind, scores in bare.general.items()}
    texts = {"domain text": bare.domain, **kinds}
    counted = [
        f"{name} {len(scores)} documents, {data_size(sum(score.bytes for score in scores))}"
        for name, scores in texts.items()
        if len(scores) > 1
    ]
    counted += [f"{len(bare.answers)} questions"] if bare.answers else []
    said = [f"scored: {'; '.join(counted)}; ± is one standard error over them"] if counted else []
    return said + [one_document(name) for name, scores in texts.items() if len(scores) == 1]


def _columns(rows: Sequence[MethodFigures]) -> list[str]:
    """What the columns of cost mean, of those that are shown."""
    found = []
    if any(row.result.steps for row in rows):
        found.append(
            "device-seconds: all steps that a method needs, also what it shares with others"
        )
    if any(row.result.peak_bytes for row in rows):
        found.append(
            "peak memory: of the process, the open host included, while a method is made and used"
        )
    if any(row.result.use for row in rows):
        found.append(
            "1M tokens: to generate so many on this machine, one request at a time, by one"
            " generation of 16"
        )
    return found


def parts(
    rows: Sequence[MethodFigures], price: float | None
) -> list[tuple[list[str], list[list[str]]]]:
    """Two tables, what methods are worth and what they cost, each with the methods' names."""
    names, lines = body(rows, price)
    first_cost = next((n for n, name in enumerate(names) if name == _FIRST_COST), len(names))
    worth, costs = range(1, first_cost), range(first_cost, len(names))
    return [
        ([names[n] for n in (0, *chosen)], [[line[n] for n in (0, *chosen)] for line in lines])
        for chosen in (worth, costs)
        if chosen
    ]


def _waited(rows: Sequence[MethodFigures]) -> list[str]:
    """How much longer than the processors worked methods took, where that was not the same."""
    found = []
    for row in rows:
        taken = [step for step in row.result.steps if step.cpu_sec is not None]
        sec, cpu_sec = sum(step.sec for step in taken), sum(step.cpu_sec or 0.0 for step in taken)
        if cpu_sec <= _BUSY * sec and sec >= 1:
            found.append(f"{row.name} {duration(cpu_sec)} of {duration(sec)}")
    said = (
        "processors worked for a part of the clock's time, since the machine did other work"
        " meanwhile or waited for its accelerator"
    )
    timed = [
        row.name
        for row in rows
        if (use := row.result.use)
        and use.cpu_sec is not None
        and use.cpu_sec <= _BUSY * (use.sec or 0)
    ]
    notes = [f"{said}: {'; '.join(found)}"] if found else []
    if timed:
        notes.append(f"1M tokens is too long, by the clock, for {', '.join(timed)}: {said}")
    return notes


def terminal_table(rows: Sequence[MethodFigures], price: float | None) -> str:
    """Two tables for a terminal, what methods are worth and what they cost, with notes."""
    drawn = (_drawn(names, lines) for names, lines in parts(rows, price))
    return "\n\n".join([*drawn, "\n".join(map(_wrapped, notes(rows)))])


def _wrapped(note: str) -> str:
    return fill(note, _WIDTH, initial_indent="  ", subsequent_indent="    ", break_on_hyphens=False)


def _drawn(names: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    drawn = Table(box=box.SIMPLE_HEAD)
    for number, name in enumerate(names):
        drawn.add_column(name, justify="right" if number else "left", no_wrap=True)
    for line in lines:
        drawn.add_row(*line)
    return drawn_text(drawn, width=_WIDTH)


def markdown(
    rows: Sequence[MethodFigures],
    title: str,
    verdict: str,
    price: float | None,
    better: Sequence[tuple[str, str, float]] = (),
) -> str:
    """The comparison for a paper or a README; `better` as `page` takes it."""
    text = [f"# {title}", "", verdict, ""]
    for names, lines in parts(rows, price):
        table = [names, ["---", *["---:"] * (len(names) - 1)], *lines]
        text += [*("| " + " | ".join(line) + " |" for line in table), ""]
    if better:
        pairs = (
            f"{first} ahead of {second}: {100 * share:.0f} %" for first, second, share in better
        )
        said = "Share of paired resamples in which a method is ahead of the next one in rank"
        text += [f"{said}: {'; '.join(pairs)}.", ""]
    text += [f"* {note}" for note in notes(rows)]
    return "\n".join(text) + "\n"
