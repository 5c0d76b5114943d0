"""Measure what an adapter changes on a host: on domain text, on general text, with controls."""

import json
import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from trimtab.backends.beginnings import cut_texts, read_texts
from trimtab.backends.hf import HFModel
from trimtab.backends.open import open_host
from trimtab.config import CarrierName, EvaluateConfig, MountConfig
from trimtab.errors import InputError
from trimtab.evaluator import Evaluator
from trimtab.lmeval.tasks import LocalTask, read_task
from trimtab.metrics import DocumentScore, Estimate, bootstrap, paired_difference, pool_kinds
from trimtab.processes import Piece, do_pieces, process_count
from trimtab.report import ROWS, HostResult, Report, TokenChange, table, write_report
from trimtab.steering.kept import Kept
from trimtab.steering.mounted import Mounted
from trimtab.steering.processor import DEFAULT_CARRIERS
from trimtab.steering.rows import row_of
from trimtab.steering.scoring import RowScore, ScoredDocument
from trimtab.store.files import names_in, refuse_others, write_json
from trimtab.store.manifest import read_manifest
from trimtab.types import Advance, Document, Progress, silent

if TYPE_CHECKING:
    from trimtab.lmeval.values import TaskReport

TASKS_NAME = "tasks.json"

_SHOWN = ("head+memory", "memory", "head", "all", "live+memory", "live+head", "live")


@dataclass(frozen=True)
class Evaluation:
    """What was measured.

    Attributes:
        report: The figures.
        folder: Where report and scores lie.
        scored: Each document's scores by kind of text; the domain's kind is "".
        tasks: Figures of tasks, where there were any.
    """

    report: Report
    folder: Path
    scored: Mapping[str, Sequence[Kept]] = field(default_factory=dict, repr=False)
    tasks: "TaskReport | None" = None

    def summary(self) -> str:
        """The tables, and where the figures lie."""
        lines = []
        if self.report.hosts:
            lines += [table(self.report), f"report: {self.folder / 'report.html'}"]
        if self.tasks is not None:
            lines += [self.tasks.table(), f"tasks: {self.folder / TASKS_NAME}"]
        return "\n".join(lines)


def evaluate(
    config: EvaluateConfig,
    *,
    host: HFModel | None = None,
    is_named: bool = False,
    progress: Progress = silent,
) -> Evaluation:
    """Measure every row on held-out domain text and on general text.

    Each document's scores are kept in `out`: an interrupted run goes on where it was, and more
    documents are added to those that are scored already.

    Args:
        config: Adapter, host, texts.
        host: The host, if it is open already.
        is_named: It is the model that the configuration names, unchanged. Otherwise it may differ
            (a LoRA in it, a preamble), so neither its mount nor its scores are kept.
        progress: Shows the scoring.

    Raises:
        AdapterError: The adapter is broken.
        InputError: A text cannot be read.
        ModelError: A model cannot be opened.
    """
    started = time.perf_counter()
    rows = _rows(config)
    _check_out(config.out)
    tasks = [read_task(path) for path in config.tasks]
    if tasks:
        _check_harness()
    texts = read_texts(config) if config.data else {}
    cache = host is None or is_named
    host = host or open_host(config, progress)
    texts = cut_texts(texts, config, host)
    settings = MountConfig(
        adapter=config.adapter,
        host=config.host,
        host_keys=config.host_keys,
        seed=config.seed,
        cache=cache,
    )
    evaluator = Evaluator.prepare(config, settings, host, rows, progress)
    if texts:
        found = _score_texts(evaluator, texts, started, progress)
    else:
        found = Evaluation(Report(_domain(config), (), {}, {}), config.out)
    if not tasks:
        return found
    return replace(found, tasks=_ask(evaluator, tasks, progress))


def first_documents(evaluation: Evaluation, documents: int, *, seed: int) -> HostResult:
    """Figures of the first domain documents alone, as an evaluation of no others gives them.

    Args:
        evaluation: Of one host.
        documents: How many of its domain documents.
        seed: Of the bootstrap.
    """
    [whole] = evaluation.report.hosts
    kept = evaluation.scored[""][:documents]
    by_row = scores_by_row(kept, tuple(whole.domain))
    return replace(
        whole,
        domain=_estimates(by_row, seed),
        domain_change=_changes_from_host(by_row, seed),
        general={},
        general_kinds={},
        general_change={},
        test_bytes=_scored_bytes(by_row),
        test_tokens=_scored_tokens(kept),
    )


def _score_texts(
    evaluator: Evaluator,
    texts: Mapping[str, Sequence[Document]],
    started: float,
    progress: Progress,
) -> Evaluation:
    config, scored = evaluator.config, _scored(evaluator, texts, progress)
    scores = {kind: scores_by_row(kept, evaluator.rows) for kind, kept in scored.items()}
    first = (texts[""][0].name, scored[""][0].on_host)
    report = _report(config, evaluator.mounted, scores, first, evaluator.host)
    tokens = _scored_tokens(scored[""])
    report = replace(report, hosts=(replace(report.hosts[0], test_tokens=tokens),))
    report = replace(report, wall_sec={"evaluate": time.perf_counter() - started})
    write_report(report, config.out)
    return Evaluation(report, config.out, scored)


def _scored(
    evaluator: Evaluator, texts: Mapping[str, Sequence[Document]], progress: Progress
) -> dict[str, list[Kept]]:
    """Score all documents; several processes, where scores are kept for all of them to see."""
    listed = [(kind, document) for kind, found in texts.items() for document in found]
    first, *others = [document for _, document in listed]
    found = [_first_scored(evaluator, first, progress)]
    if others:
        found += _others_scored(evaluator, others, progress)
    scored = {kind: list[Kept]() for kind in texts}
    for (kind, _), kept in zip(listed, found, strict=True):
        scored[kind].append(kept)
    return scored


def _first_scored(evaluator: Evaluator, document: Document, progress: Progress) -> Kept:
    """Score the first document, and with it make what is made once.

    Copies of this process then have that as well. It is shown as work of its own, since the time
    that it takes says nothing of what is left.
    """
    size = len(document.text.encode())
    with progress(f"scoring {evaluator.config.adapter.name}, first text (bytes)", size) as advance:
        found = evaluator.score(document)
        _check_rows(evaluator.config.rows, found)
        advance(size)
    return found


def _others_scored(
    evaluator: Evaluator, documents: Sequence[Document], progress: Progress
) -> list[Kept]:
    pieces = [Piece(partial(_score, evaluator, d), len(d.text.encode())) for d in documents]
    sizes, found = [piece.size for piece in pieces], list[Kept]()
    with progress(f"scoring {evaluator.config.adapter.name} (bytes)", sum(sizes)) as advance:
        if evaluator.is_shared:
            do_pieces(pieces, advance, process_count(sizes, evaluator.config.processes))
        for document, size in zip(documents, sizes, strict=True):
            found.append(evaluator.score(document))
            if not evaluator.is_shared:
                advance(size)
    return found


def _score(evaluator: Evaluator, document: Document, advance: Advance) -> None:
    del advance  # A document's scores come all at once.
    evaluator.score(document)


def _ask(evaluator: Evaluator, tasks: Sequence[LocalTask], progress: Progress) -> "TaskReport":
    """Ask the rows tasks, and write their figures."""
    from trimtab.lmeval.rows import Models
    from trimtab.lmeval.run import Asked, run_tasks

    config = evaluator.config
    rows = evaluator.rows if config.rows else _task_rows(config)
    key = json.dumps([str(part) for part in evaluator.models_key])
    if not evaluator.keeps:
        # A host that was changed in memory has no name: what it answered is asked again.
        key = secrets.token_hex(16)
    asked = Asked(tasks, rows, config.out, config.task_limit, config.seed, key)
    made = Models(evaluator.host, evaluator.steering, evaluator.pair, config.task_batch)
    report = run_tasks(asked, made, progress)
    write_json(config.out / TASKS_NAME, report.as_json())
    return report


def _check_harness() -> None:
    """Refuse tasks without lm-evaluation-harness, an extra, before anything is measured."""
    try:
        import_module("trimtab.lmeval.run")
    except ModuleNotFoundError as error:
        raise InputError(
            f"--tasks needs lm-evaluation-harness, and {error.name} is not installed",
            hint="pip install 'trimtab[lmeval]'",
        ) from error


def _check_out(out: Path) -> None:
    """Refuse a folder in which a report would replace what is not one of ours."""
    if out.exists() and not out.is_dir():
        raise InputError(
            f"--out {out} is a file, and a report is a folder", hint="choose a new folder"
        )
    ours = ("report.json", "scores", TASKS_NAME, "tasks")
    others = names_in(out)
    if not set(ours) & set(others):
        refuse_others(out, others, "report")


def _domain(config: EvaluateConfig) -> str:
    return config.domain or _name_of(config.data[0] if config.data else str(config.adapter))


def _name_of(pattern: str) -> str:
    """The last part of a path or pattern that is a name."""
    parts = (Path(part).stem for part in reversed(Path(pattern).resolve().parts))
    return next((part for part in parts if part and not set(part) & set("*?[/")), "domain")


def _rows(config: EvaluateConfig) -> tuple[str, ...]:
    """Those that are asked for, or the usual ones; all others are compared with the host."""
    if config.rows:
        return tuple(dict.fromkeys(("host", *config.rows)))
    return _usual_rows(config) if config.data else _task_rows(config)


def _task_rows(config: EvaluateConfig) -> tuple[str, ...]:
    """The host, and what needs no small model beside it, if the adapter carries that."""
    carriers = read_manifest(config.adapter, verify=False).carriers
    light: list[CarrierName] = [name for name in DEFAULT_CARRIERS if name in carriers]
    return ("host", row_of(light or ["expert"]))


def _usual_rows(config: EvaluateConfig) -> tuple[str, ...]:
    """Those of the report; `all` is the row of whatever carriers the adapter has."""
    together = row_of(read_manifest(config.adapter, verify=False).carriers)
    return tuple(dict.fromkeys(together if row == "all" else row for row in ROWS))


def _check_rows(asked: Sequence[str], kept: Kept) -> None:
    missing = [row for row in asked if row not in (kept.on_host.rows.keys() | kept.small.keys())]
    if missing:
        raise InputError(
            f"the adapter has no carrier for the rows {', '.join(missing)}",
            hint="ask for other --rows, or make the carrier with `trimtab fit`",
        )


def scores_by_row(scored: Sequence[Kept], rows: Sequence[str]) -> dict[str, list[DocumentScore]]:
    """What each row paid for each document, a small model by itself for its own tokens.

    Args:
        scored: Documents.
        rows: Rows that are wanted; one that was not scored is left out.
    """
    scores: dict[str, list[DocumentScore]] = {}
    for kept in scored:
        size = sum(kept.on_host.sizes)
        found = {
            row: DocumentScore(-float(score.logprobs.sum()), size)
            for row, score in kept.on_host.rows.items()
        }
        for row, score in (found | dict(kept.small)).items():
            if row in rows:
                scores.setdefault(row, []).append(score)
    return scores


def _scored_tokens(scored: Sequence[Kept]) -> int:
    return sum(len(kept.on_host.token_ids) for kept in scored)


def _scored_bytes(by_row: Mapping[str, Sequence[DocumentScore]]) -> int:
    return sum(score.scored_bytes for score in by_row["host"])


def _estimates(by_row: Mapping[str, list[DocumentScore]], seed: int) -> dict[str, Estimate]:
    return {row: bootstrap(found, seed=seed) for row, found in by_row.items()}


def _changes_from_host(by_row: Mapping[str, list[DocumentScore]], seed: int) -> dict[str, Estimate]:
    return {
        row: paired_difference(found, by_row["host"], seed=seed) for row, found in by_row.items()
    }


def _report(
    config: EvaluateConfig,
    mounted: Mounted,
    scores: Mapping[str, Mapping[str, list[DocumentScore]]],
    first: tuple[str, ScoredDocument],
    host: HFModel,
) -> Report:
    estimates = {kind: _estimates(by_row, config.seed) for kind, by_row in scores.items()}
    kinds = {kind: found for kind, found in estimates.items() if kind}
    general: dict[str, Estimate] = {}
    if kinds:
        for row in estimates[""]:
            general[row] = pool_kinds([found[row] for found in kinds.values()])
    changes = {kind: _changes_from_host(by_row, config.seed) for kind, by_row in scores.items()}
    general_change = {
        row: pool_kinds([found[row] for kind, found in changes.items() if kind]) for row in general
    }
    result = HostResult(
        host=config.host,
        small=mounted.manifest.base_model.ref,
        domain=estimates[""],
        general=general,
        general_kinds=kinds,
        domain_change=changes[""],
        general_change=general_change,
        test_bytes=_scored_bytes(scores[""]),
    )
    sizes = {c: mounted.manifest.bytes_of(c) for c in mounted.manifest.carriers}
    return Report(
        domain=_domain(config),
        hosts=(result,),
        wall_sec={},
        adapter_bytes=sizes,
        tokens=_changes(first[1], _shown_row(first[1]), host),
        tokens_name=first[0],
        tokens_row=_shown_row(first[1]),
    )


def _shown_row(scored: ScoredDocument) -> str:
    """The row that needs no second model, as far as it was asked for."""
    return next((row for row in _SHOWN if row in scored.rows), "host")


def _changes(scored: ScoredDocument, row: str, host: HFModel) -> tuple[TokenChange, ...]:
    """Where the adapter changed the host's mind, token by token."""
    before, after = scored.rows["host"], scored.rows[row]
    columns = (scored.token_ids, before.logprobs, after.logprobs, _tops(host, before))
    return tuple(
        TokenChange(_text(host, token), -float(b), -float(a), top_before, top_after)
        for token, b, a, top_before, top_after in zip(*columns, _tops(host, after), strict=True)
    )


def _tops(host: HFModel, row: RowScore) -> list[str]:
    return [_text(host, token_id) for token_id in row.top_ids.tolist()]


def _text(host: HFModel, token_id: int) -> str:
    return (host.vocabulary.token_bytes[token_id] or b"").decode("utf-8", "replace")
