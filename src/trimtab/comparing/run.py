"""Measure methods one after another; each result is kept, and a measured one is not run again."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from trimtab.comparing import sizes
from trimtab.comparing.bench import Bench
from trimtab.comparing.budget import NotRun
from trimtab.comparing.embeddings import classify
from trimtab.comparing.figures import BASELINE
from trimtab.comparing.kept import Kept, read_result, result_path, write_result
from trimtab.comparing.measure import watched
from trimtab.comparing.methods import METHODS
from trimtab.comparing.scoring import Subject, answer_all, score_texts, timed_use
from trimtab.comparing.split import key_of
from trimtab.comparing.trust import learnt_trust
from trimtab.comparing.values import SCHEMA, MethodResult, Use
from trimtab.types import Progress

EMBEDDINGS = "embeddings"
ORDER = (*METHODS, EMBEDDINGS)


def run_method(bench: Bench, name: str) -> MethodResult:
    """Measure a method, or say what it would cost; keep the result.

    Raises:
        TrimtabError: The method failed for another reason than time, memory or hardware.
    """
    path, key, before = _kept(bench, name)
    if before is not None and before.is_whole:
        if name == BASELINE:
            _learn_speed(bench)
        return before
    try:
        result = _embedded(bench, key) if name == EMBEDDINGS else _measured(bench, name, key)
    except NotRun as why:
        if before is not None and before.status == "measured":
            return before
        result = _estimated(bench, name, key, why.reason)
    write_result(path, result)
    return result


def measured_before(bench: Bench, name: str) -> MethodResult | None:
    """What an earlier run has measured of a method, on the same text with the same settings."""
    *_, found = _kept(bench, name)
    return found if found is not None and found.status == "measured" else None


def _kept(bench: Bench, name: str) -> tuple[Path, str, MethodResult | None]:
    """Where a method's result lies, what it must be of, and what is there of that."""
    path, key = result_path(bench.folder, name), key_of(bench.key, SCHEMA, name)
    return path, key, read_result(path, key)


def _measured(bench: Bench, name: str, key: str) -> MethodResult:
    method, is_baseline = METHODS[name], name == BASELINE
    kept = Kept(result_path(bench.folder, name), key)

    def guarded(work: str) -> Progress:
        # Without the bare host there is nothing to compare with.
        return bench.progress if is_baseline else bench.guarded(work)

    with method.made(bench) as made:
        score_texts(
            made.subject, bench.texts, bench.config.window_tokens, kept, guarded("scoring it")
        )
        subject, task = made.subject, bench.split.task
        if task is not None:
            guard = guarded("learning whom to trust")
            found = learnt_trust(made.subject, task.kind, bench.split.examples, kept, guard)
            subject = replace(made.subject, trust=found)
            answer_all(subject, task, kept, guarded("answering the questions"))
        use, untimed = _timed(bench, made.subject, guarded("timing it"))
        if is_baseline:
            _learn_speed(bench)
        texts = kept.texts
        return MethodResult(
            method=name,
            key=key,
            status="measured",
            reason=untimed,
            domain=texts.pop(""),
            general=texts,
            answers=kept.answers,
            trust=_named(subject),
            steps=made.steps,
            use=use,
            artefact_bytes=made.artefact_bytes,
            further_hosts=method.further_hosts,
            note=made.note,
        )


def _named(subject: Subject) -> dict[str, float]:
    """How far each predictor is trusted for an answer, where that was learnt."""
    if subject.trust is None:
        return {}
    return dict(zip(subject.mixture.members, subject.trust.tolist(), strict=True))


def _timed(bench: Bench, subject: Subject, progress: Progress) -> tuple[Use | None, str]:
    """What using a method costs, or why that was not timed."""
    try:
        return timed_use(subject, bench.texts[""][0].text, progress), ""
    except NotRun as why:
        return None, f"its use was not timed: {why.reason}"


def _learn_speed(bench: Bench) -> None:
    """Time the host over one window, the fastest of three, to predict all other reading by."""
    document = max(bench.texts[""], key=lambda document: len(document.text))
    read = bench.host.encode(document.text)[: bench.config.window_tokens]
    took = []
    for _ in range(3):
        with watched() as watch:
            bench.hidden_and_logits(read)
        took.append(watch.sec)
    needed = sizes.reading_flops(bench.host_shape, len(read), len(read))
    bench.budget.reading = needed / max(min(took), 1e-9)


def _embedded(bench: Bench, key: str) -> MethodResult:
    answers, step, use, size = classify(bench)
    return MethodResult(
        method=EMBEDDINGS,
        key=key,
        status="measured",
        answers=answers,
        steps=(step,),
        use=use,
        artefact_bytes=size,
        further_hosts="has no host",
        note="logistic regression on the small model's mean hidden states; it writes no text,"
        f" and answers a question in {use.sec_per_token:.2f} s",
    )


def _estimated(bench: Bench, name: str, key: str, reason: str) -> MethodResult:
    method = METHODS.get(name)
    return MethodResult(
        method=name,
        key=key,
        status="estimated",
        reason=reason,
        steps=method.estimate(bench) if method else (),
        further_hosts=method.further_hosts if method else "has no host",
    )


def in_order(asked: Sequence[str]) -> list[str]:
    """Methods in the order in which they are run, the baseline first among them."""
    return [name for name in ORDER if name in asked or name == BASELINE]
