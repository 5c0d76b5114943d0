"""Measure methods one after another; each result is kept, and a measured one is not run again."""

from collections.abc import Sequence
from pathlib import Path

from pydantic import ValidationError

from trimtab.comparing import sizes
from trimtab.comparing.bench import Bench
from trimtab.comparing.budget import NotRun
from trimtab.comparing.embeddings import classify
from trimtab.comparing.figures import BASELINE
from trimtab.comparing.measure import watched
from trimtab.comparing.methods import METHODS
from trimtab.comparing.scoring import answer_all, score_texts, timed_use
from trimtab.comparing.split import key_of
from trimtab.comparing.values import SCHEMA, MethodResult
from trimtab.errors import InputError
from trimtab.store.files import read_json, write_json

FOLDER = "methods"
EMBEDDINGS = "embeddings"
ORDER = (*METHODS, EMBEDDINGS)


def run_method(bench: Bench, name: str) -> MethodResult:
    """Measure a method, or say what it would cost; keep the result.

    Raises:
        TrimtabError: The method failed for another reason than time, memory or hardware.
    """
    path = bench.folder / FOLDER / f"{name}.json"
    key = key_of(bench.key, SCHEMA, name)
    kept = _kept(path)
    if kept is not None and kept.key == key and kept.status == "measured":
        if name == BASELINE:
            _learn_speed(bench)
        return kept
    try:
        result = _embedded(bench, key) if name == EMBEDDINGS else _measured(bench, name, key)
    except NotRun as why:
        result = _estimated(bench, name, key, why.reason)
    write_json(path, result.model_dump(mode="json"))
    return result


def _kept(path: Path) -> MethodResult | None:
    if not path.is_file():
        return None
    try:
        return MethodResult.model_validate(read_json(path, "result of a method"))
    except ValidationError as error:
        raise InputError(
            f"{path} is no result of a method: {error.error_count()} errors",
            hint="delete the file, and the method is run again",
        ) from error


def _measured(bench: Bench, name: str, key: str) -> MethodResult:
    method, is_baseline = METHODS[name], name == BASELINE
    guard = bench.budget.guard
    window, progress = bench.config.window_tokens, bench.progress
    with method.made(bench) as made:
        scoring = (lambda _: None) if is_baseline else guard("scoring it")
        texts = score_texts(made.subject, bench.texts, window, progress, scoring)
        answers: tuple[int | str, ...] = ()
        if bench.split.task is not None:
            answering = (lambda _: None) if is_baseline else guard("answering the questions")
            answers = answer_all(made.subject, bench.split.task, progress, answering)
        use = timed_use(made.subject, bench.texts[""][0].text)
        if is_baseline:
            _learn_speed(bench)
        return MethodResult(
            method=name,
            key=key,
            status="measured",
            domain=texts.pop(""),
            general=texts,
            answers=answers,
            steps=made.steps,
            use=use,
            artefact_bytes=made.artefact_bytes,
            further_hosts=method.further_hosts,
            note=made.note,
        )


def _learn_speed(bench: Bench) -> None:
    """Time a pass of the host over one window, from which all other reading is predicted."""
    document = max(bench.texts[""], key=lambda document: len(document.text))
    read = bench.host.encode(document.text)[: bench.config.window_tokens]
    with watched() as watch:
        bench.hidden_and_logits(read)
    needed = sizes.reading_flops(bench.host_shape, len(read), len(read))
    bench.budget.reading = needed / max(watch.sec, 1e-9)


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
        note="logistic regression on the small model's mean hidden states; it writes no text",
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
