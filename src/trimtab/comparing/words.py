"""A comparison in plain words, every word of them from its figures. Pure."""

from collections import Counter
from collections.abc import Sequence

from trimtab.comparing.figures import (
    BASELINE,
    ENOUGH,
    GENERAL,
    SURE,
    MethodFigures,
    advantage,
    drawn_from,
    quality,
    quality_of,
    ranked,
    share_ahead,
    share_of_gain,
    surely_ahead,
)
from trimtab.comparing.questions import Task
from trimtab.metrics import Estimate
from trimtab.report.words import duration, signed

METHOD_WORDS = {
    "zero-shot": "the host as it is",
    "few-shot": "the host with a few examples in its prompt",
    "context": "the host with domain text in its context",
    "expert": "the tuned small model instead of the host",
    "trimtab": "Trimtab: head and memory on the host, no second model",
    "live": "Trimtab: the tuned small model beside the host",
    "all": "Trimtab: head, memory and the tuned small model",
    "label-head": "a head on the host, fitted to labels",
    "embeddings": "logistic regression on the small model’s embeddings",
    "lora": "LoRA on the host",
    "qlora": "QLoRA on the host",
    "full": "all weights of the host trained",
}
TRIMTAB = ("trimtab", "live", "all")
_MORE = {
    "documents": "give more of them, with --test, or with a larger --test-share or --test-tokens",
    "questions": "give more of them, with a longer --task, or a larger --task-questions",
}
_REACH = ("mount", "nothing")


def spoken(by: str, row: MethodFigures) -> str:
    """A method's quality with its error: "1.213 ± 0.010 bits per byte"."""
    value = quality_of(row, by)
    if value is None:
        return ""
    if by == "bits per byte":
        return f"{spoken_bits(value, drawn_from(row, by))} bits per byte"
    return f"{by} {100 * value.mean:.1f} ± {100 * value.stderr:.1f} %"


def spoken_bits(value: Estimate, documents: int) -> str:
    """Bits per byte with their error, where so many documents can tell one."""
    return f"{value.mean:.3f} ± {value.stderr:.3f}" if documents > 1 else f"{value.mean:.3f}"


def spoken_change(change: Estimate, before: float, documents: int) -> str:
    """A change in percent of what was before, with its error where documents can tell one."""
    if before <= 0:
        return ""
    scale = 100 / before
    error = f" ± {change.stderr * scale:.1f}" if documents > 1 else ""
    return f"{signed(change.mean * scale, 1)}{error} %"


def verdict(rows: Sequence[MethodFigures], task: Task | None, *, seed: int = 0) -> str:
    """What to choose for this data and why.

    The best method is named; then the one that takes the least time before use among those that
    are not surely worse (paired bootstrap, `surely_ahead`); what it costs, what costs less in
    use, and what it does to general text; how Trimtab stands to training the host; and what was
    not measured.
    """
    by = quality(rows)
    order = ranked(rows, by)
    best, bare = order[0], next(row for row in rows if row.name == BASELINE)
    if order == [bare]:
        return f"{_nothing(bare, by)} {_not_run(rows)}".strip()
    even = [row for row in order if not surely_ahead(best, row, by, task, seed=seed)]
    # The bare host takes nothing, of which prompts that take no time before use add something.
    cheap = min(even, key=lambda row: (row.result.sec, row is not bare))
    parts = [_best(best, bare, by, task, seed), _even_with(order, by), _commonest(best, task)]
    if drawn_from(best, by) < ENOUGH:
        # What cannot be told apart is no reason to choose.
        cheap = best
    else:
        parts.append(_choice(best, cheap, bare, by))
    faster = [row for row in order if surely_ahead(row, bare, by, task, seed=seed)]
    parts += [_use(cheap, bare), _in_a_hurry(cheap, faster, bare, by), _general(cheap)]
    ours = [row for row in order if row.name in TRIMTAB][:1]
    named = [row for row in (cheap, *ours) if row is not best]
    parts += [
        _against_host(named, bare, by, task, seed),
        _against_lora(rows, by, task, seed),
        _general_beside_lora(rows, by, cheap),
        _against_regression(rows, by, task, seed),
    ]
    parts.append(_not_run(rows))
    return " ".join(part for part in parts if part)


def _nothing(bare: MethodFigures, by: str) -> str:
    return (
        f"Nothing was measured but the host as it is ({bare.name}, {spoken(by, bare)}): there is"
        " nothing to choose from."
    )


def _best(best: MethodFigures, bare: MethodFigures, by: str, task: Task | None, seed: int) -> str:
    named = f"{METHOD_WORDS[best.name]} ({best.name}, {spoken(by, best)})"
    if best is bare:
        return f"Nothing that was measured is better than {named}."
    share, drawn = share_ahead(best, bare, by, task, seed=seed), drawn_from(best, by)
    is_sure = surely_ahead(best, bare, by, task, seed=seed)
    sure = "surely" if is_sure else "but not surely"
    known = f"ahead in {100 * share:.0f} % of resamples"
    unit = "documents" if by == "bits per byte" else "questions"
    if not is_sure and (share >= SURE or drawn < ENOUGH):
        known += f", but fewer than {ENOUGH} {unit} tell the two apart: {_MORE[unit]}"
    if drawn < 2:
        known = f"on one {unit[:-1]}, whose errors nobody can tell: {_MORE[unit]}"
    return (
        f"Best on this data is {named}, {sure} better than the host as it is ({spoken(by, bare)};"
        f" {known})."
    )


def _even_with(order: Sequence[MethodFigures], by: str) -> str:
    """Methods that the best one is exactly as good as."""
    first, *others = [quality_of(row, by) for row in order]
    names = [
        row.name
        for row, value in zip(order[1:], others, strict=True)
        if first and value and value.mean == first.mean
    ]
    return f"Exactly as good: {', '.join(names)}." if names else ""


def _commonest(best: MethodFigures, task: Task | None) -> str:
    """What a classification's commonest class would get, which takes no model."""
    if task is None or task.kind != "classes" or not best.result.answers:
        return ""
    counts = Counter(question.answer for question in task.questions)
    share = max(counts.values()) / len(task.questions)
    return f"The commonest class, given each time, would be right in {100 * share:.1f} %."


def _choice(best: MethodFigures, cheap: MethodFigures, bare: MethodFigures, by: str) -> str:
    if cheap is best:
        return f"Choose {best.name}: it takes {_time(best)} before use."
    if cheap is bare:
        return (
            f"Choose the host as it is ({bare.name}), which takes nothing, or give more to"
            " measure on."
        )
    return (
        f"But {METHOD_WORDS[cheap.name]} ({cheap.name}, {spoken(by, cheap)}) is not surely"
        f" worse, and takes {_time(cheap)} before use instead of {_time(best)}: choose"
        f" {cheap.name}."
    )


def _stands(row: MethodFigures, rival: MethodFigures, by: str, task: Task | None, seed: int) -> str:
    """How a method stands to another one."""
    ours, theirs = quality_of(row, by), quality_of(rival, by)
    if drawn_from(row, by) < 2 or ours is None or theirs is None:
        return "not to be told from"
    if surely_ahead(row, rival, by, task, seed=seed):
        return "better than"
    if surely_ahead(rival, row, by, task, seed=seed):
        return "worse than"
    if ours.mean == theirs.mean:
        return "even with"
    is_ahead = advantage(by) * (ours.mean - theirs.mean) > 0
    place, better = ("ahead", "better") if is_ahead else ("behind", "worse")
    return f"{place}, but not surely {better} than"


def _time(row: MethodFigures) -> str:
    return "no time" if not row.result.steps else duration(row.result.sec)


def _against_host(
    rows: Sequence[MethodFigures], bare: MethodFigures, by: str, task: Task | None, seed: int
) -> str:
    """How methods that are not the best one stand to the bare host."""
    others = {row.name: row for row in rows if row is not bare}
    said = (f"{name} is {_stands(row, bare, by, task, seed)}" for name, row in others.items())
    return " ".join(f"{stands} the host as it is." for stands in said)


def _against_lora(rows: Sequence[MethodFigures], by: str, task: Task | None, seed: int) -> str:
    lora = next((row for row in rows if row.name == "lora"), None)
    ours = [row for row in ranked(rows, by) if row.name in TRIMTAB]
    if lora is None or not ours:
        return ""
    row = ours[0]
    if quality_of(lora, by) is None:
        if not lora.result.sec:
            return ""
        return (
            f"LoRA on the host was not run; it would take about {duration(lora.result.sec)}"
            f" for each host, where {row.name} took {_time(row)}."
        )
    how = _stands(row, lora, by, task, seed)
    bare = next(row for row in rows if row.name == BASELINE)
    gains = by == "bits per byte" and surely_ahead(lora, bare, by, task, seed=seed)
    reached = share_of_gain(row, lora, bare) if gains else None
    share = f", with {_share(reached)} its gain on text" if reached and reached > 0 else ""
    return (
        f"Against LoRA on the host ({spoken(by, lora)}, {_time(lora)} for each host) the best of"
        f" Trimtab’s ways, {row.name} ({spoken(by, row)}, {_time(row)}), is {how} it{share};"
        f" {_reach(row)}"
    )


def _share(reached: float) -> str:
    return f"{100 * reached:.0f} % of" if reached < 2 else f"{reached:.1f} times"


def _general_beside_lora(rows: Sequence[MethodFigures], by: str, told: MethodFigures) -> str:
    """What general text pays for LoRA, and for the best of Trimtab's ways unless that is told."""
    lora = next((row for row in rows if row.name == "lora"), None)
    ours = [row for row in ranked(rows, by) if row.name in TRIMTAB]
    if lora is None or not ours:
        return ""
    first, second = _general_change(ours[0]), _general_change(lora)
    if not first or not second:
        return ""
    if ours[0] is told:
        return f"LoRA changes general text by {second} bits per byte."
    return f"{ours[0].name} changes general text by {first} bits per byte, LoRA by {second}."


def _against_regression(
    rows: Sequence[MethodFigures], by: str, task: Task | None, seed: int
) -> str:
    simple = next((row for row in rows if row.name == "embeddings" and row.task), None)
    ours = [row for row in ranked(rows, by) if row.name in TRIMTAB]
    if simple is None or not ours:
        return ""
    return (
        f"The simple baseline, {METHOD_WORDS['embeddings']} ({spoken(by, simple)}), is"
        f" {_stands(simple, ours[0], by, task, seed)} {ours[0].name} ({spoken(by, ours[0])})."
    )


def _use(row: MethodFigures, bare: MethodFigures) -> str:
    if row is bare or row.result.use is None or bare.result.use is None:
        return ""
    if not row.result.writes_text:
        return "It answers questions, and writes no text."
    times = row.result.use.sec_per_token / bare.result.use.sec_per_token
    if 0.95 < times < 1.05:
        return "A token then takes as long as with the host as it is."
    return f"A token then takes {times:.2g} times as long as with the host as it is."


def _in_a_hurry(
    row: MethodFigures, better: Sequence[MethodFigures], bare: MethodFigures, by: str
) -> str:
    """The best that is surely better than the bare host and takes half the time in use or less."""
    if row.result.use is None or bare.result.use is None or not row.result.writes_text:
        return ""
    most = row.result.use.sec_per_token / 2
    found = (
        (other, other.result.use.sec_per_token / bare.result.use.sec_per_token)
        for other in better
        if other.result.use and other.result.writes_text
    )
    limit = most / bare.result.use.sec_per_token
    other, times = next(((one, took) for one, took in found if took <= limit), (None, 0.0))
    if other is None:
        return ""
    return (
        f"Where that matters more, {other.name} ({spoken(by, other)}) is the best of what takes"
        f" half of that or less, {times:.2g} times the host’s, and is surely better than the host."
    )


def _reach(row: MethodFigures) -> str:
    steps = row.result.steps
    again = [step for step in steps if not step.serves_all_hosts]
    took = duration(sum(step.sec for step in again)) if again else "no time"
    return f"on a further host it takes {took}."


def _general(row: MethodFigures) -> str:
    change, percent = row.general_change, _general_change(row)
    if change is None or not percent:
        return ""
    if drawn_from(row, GENERAL) < 2:
        return f"On general text {row.name} is at {percent} bits per byte, no error known."
    word = "is worse than the host" if change.mean > 0 else "is better than the host"
    if abs(change.mean) <= 2 * change.stderr:
        word = "is within two standard errors of the host"
    return f"On general text {row.name} {word} ({percent} bits per byte)."


def _general_change(row: MethodFigures) -> str:
    change, value = row.general_change, row.general
    if change is None or value is None:
        return ""
    return spoken_change(change, value.mean - change.mean, drawn_from(row, GENERAL))


def _not_run(rows: Sequence[MethodFigures]) -> str:
    names = [row.name for row in rows if row.result.status == "estimated"]
    if not names:
        return ""
    return (
        "Not measured, for the reasons below the tables, and no part of this choice:"
        f" {', '.join(names)}."
    )
