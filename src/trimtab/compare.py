"""Compare ways to adapt a host on the user's own data."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from trimtab.backends.beginnings import MIN_DOCUMENT_BYTES, beginning
from trimtab.backends.hf import HFModel
from trimtab.backends.open import one_device, open_model
from trimtab.comparing.bench import Bench, model_key
from trimtab.comparing.budget import Budget, seconds_of
from trimtab.comparing.figures import (
    MethodFigures,
    drawn_from,
    figures_of,
    pareto,
    quality,
    ranked,
    share_ahead,
)
from trimtab.comparing.kept import FOLDER, STEPS
from trimtab.comparing.measure import memory_bytes
from trimtab.comparing.page import page
from trimtab.comparing.run import ORDER, in_order, measured_before, run_method
from trimtab.comparing.sizes import shape_of
from trimtab.comparing.split import ASKED_NAME, Split, split_data, write_split
from trimtab.comparing.table import markdown, terminal_table, usd_per_million
from trimtab.comparing.values import SCHEMA, MethodResult
from trimtab.comparing.words import verdict
from trimtab.config import CompareConfig
from trimtab.errors import InputError, ModelError
from trimtab.metrics import Estimate
from trimtab.store.files import (
    lock,
    names_in,
    package_versions,
    refuse_others,
    write_atomic,
    write_json,
)
from trimtab.types import Document, Progress, silent

REPORT_NAME = "comparison.json"
_NAMELESS = ("model", "train", "data", "text", "task")
"""What files are called whose folder has the name."""

MANY_DOCUMENTS = 8
"""So many documents share the test text where a document's share of it is not given."""

MIN_SHARE_TOKENS = 32
"""Of a document; fewer hardly show how its text goes on."""

RESERVE = 0.03
"""Share of the budget that is left for what shows no progress: opening models, the report."""


@dataclass(frozen=True)
class CompareResult:
    """What was found.

    Attributes:
        folder: Folder of the comparison.
        rows: Every method.
        verdict: What to choose, in words.
        better: Methods next to each other in rank, with the share of resamples for the first.
        price: US dollars for an hour of this machine, or None.
    """

    folder: Path
    rows: tuple[MethodFigures, ...]
    verdict: str
    better: tuple[tuple[str, str, float], ...]
    price: float | None

    def summary(self) -> str:
        """The verdict, the table, and where the report lies."""
        table = terminal_table(self.rows, self.price)
        return f"{self.verdict}\n\n{table}\nreport: {self.folder / 'comparison.html'}"


def compare(config: CompareConfig, *, progress: Progress = silent) -> CompareResult:
    """Run every method on one split of the data, within a budget of time and memory.

    Results are kept method by method: an interrupted comparison goes on where it was, and with a
    larger budget what was estimated before is run.

    Args:
        config: Data, models, methods, budget.
        progress: Shows the work.

    Returns:
        Figures of every method, with a verdict in words; the folder holds the same as JSON, HTML
        and Markdown.

    Raises:
        InputError: The data cannot be used, or the folder holds other things.
        ModelError: A model cannot be opened, or the host is an encoder-decoder.
    """
    budget = _budget(config)
    with lock(config.out):
        _check_out(config.out)
        split = split_data(config)
        write_split(split, config.out / "data")
        bench = _bench(config, split, budget, progress)
        bench.check_steps()
        asked = in_order(config.methods or ORDER)
        if not config.methods and (split.task is None or split.task.kind != "classes"):
            asked.remove("embeddings")
        results = _results(bench, asked, progress)
        rows = tuple(figures_of(results, split.task, seed=config.seed))
        by = quality(rows)
        order = ranked(rows, by)
        better = tuple(
            (a.name, b.name, share_ahead(a, b, by, split.task, seed=config.seed))
            for a, b in pairwise(order)
            if drawn_from(a, by) > 1
        )
        said = verdict(rows, split.task, seed=config.seed)
        found = CompareResult(config.out, rows, said, better, config.price)
        _write(found, bench)
    return found


def _results(bench: Bench, asked: Sequence[str], progress: Progress) -> list[MethodResult]:
    """Of the methods that are asked for, and of others what earlier runs have measured."""
    found = {name: kept for name in ORDER if (kept := measured_before(bench, name))}
    with progress("comparing (methods)", len(asked)) as advance:
        for name in asked:
            found[name] = run_method(bench, name)
            advance(1)
    return [found[name] for name in ORDER if name in found]


def _budget(config: CompareConfig) -> Budget:
    free = memory_bytes() if config.memory_gb is None else config.memory_gb * 1e9
    try:
        return Budget(seconds_of(config.budget) * (1 - RESERVE), free)
    except ValueError as error:
        raise InputError(
            f"--budget {config.budget}: {error}", hint="write a number and its unit"
        ) from error


def _check_out(out: Path) -> None:
    ours = {REPORT_NAME, "data", FOLDER, STEPS}
    others = names_in(out)
    if not ours & set(others):
        refuse_others(out, others, "comparison")


def _bench(config: CompareConfig, split: Split, budget: Budget, progress: Progress) -> Bench:
    small = open_model(config.small, dtype=config.dtype, device_map=one_device(), progress=progress)
    small_shape, small_key = shape_of(small), model_key(small)
    # Both at once would take memory that the comparison itself does not need.
    del small
    host = open_model(config.host, dtype=config.dtype, progress=progress)
    if host.is_encoder_decoder:
        raise ModelError(
            f"{config.host} reads a source and writes a target; hosts that continue text are"
            " compared",
            hint="choose a causal model as host",
        )
    asked_alone = not config.data and not config.test
    test = _put_together(split.test) if asked_alone else split.test
    texts = {"": test, **split.general}
    half = config.test_tokens // 2 // max(len(split.general), 1)
    limits = {kind: half if kind else config.test_tokens for kind in texts}
    cut = {
        kind: _cut(found, limits[kind], config, host, f"--general {kind}" if kind else "test text")
        for kind, found in texts.items()
    }
    models = f"{small_key} {model_key(host)}"
    return Bench(config, split, cut, host, models, shape_of(host), small_shape, budget, progress)


def _cut(
    documents: Sequence[Document], limit: int, config: CompareConfig, host: HFModel, what: str
) -> list[Document]:
    """The beginnings of documents that are scored: the same text for every model."""
    kept, most = [], min(config.document_tokens or _share(limit, len(documents)), limit)
    for document in documents:
        tokens, raw = beginning(host, document.text, min(most, limit))
        if len(raw) >= MIN_DOCUMENT_BYTES:
            limit -= tokens
            kept.append(replace(document, text=raw.decode("utf-8", "ignore")))
    if not kept:
        raise InputError(
            f"none of {len(documents)} documents of {what} has {MIN_DOCUMENT_BYTES} bytes in its"
            f" first {most} host tokens, its share of --test-tokens",
            hint="give longer documents, or raise --test-tokens or --document-tokens",
        )
    return kept


def _put_together(documents: Sequence[Document]) -> list[Document]:
    """Join a question that is too short to be scored alone with those that follow it."""
    found: list[Document] = []
    for document in documents:
        if found and _is_short(found[-1]):
            document = replace(found[-1], text=found.pop().text + document.text)
        found.append(document)
    if len(found) > 1 and _is_short(found[-1]):
        rest = found.pop()
        found[-1] = replace(found[-1], text=found[-1].text + rest.text)
    return found


def _is_short(document: Document) -> bool:
    return len(document.text.encode()) < MIN_DOCUMENT_BYTES


def _share(limit: int, documents: int) -> int:
    """Tokens of a document at most: no error can be told from one document that takes them all."""
    return max(limit // min(documents, MANY_DOCUMENTS), MIN_SHARE_TOKENS)


def _write(found: CompareResult, bench: Bench) -> None:
    config, rows = bench.config, found.rows
    title = f"Ways to adapt {_name(config.host)} to {_name((*config.data, str(config.task))[0])}"
    content = {
        "schema": SCHEMA,
        "config": config.model_dump(mode="json"),
        "packages": package_versions(),
        "data": {
            "sha256": bench.split.sha256,
            "train_documents": len(bench.split.train),
            "learnt_questions": len(bench.split.examples),
            "repeated_questions": bench.split.repeated,
            "scored": {kind or "domain": [d.name for d in ds] for kind, ds in bench.texts.items()},
            "scored_tokens": bench.test_tokens,
            "questions": len(bench.split.task.questions) if bench.split.task else 0,
            "asked": f"data/{ASKED_NAME}" if bench.split.task else None,
        },
        "this_run_sec": bench.budget.spent_sec,
        "threads": torch.get_num_threads(),
        "verdict": found.verdict,
        "ranked_by": quality(rows),
        "better": [list(pair) for pair in found.better],
        "pareto": sorted(pareto(rows, quality(rows), lambda row: row.result.sec)),
        "methods": {row.name: _as_json(row, bench) for row in rows},
    }
    write_json(config.out / REPORT_NAME, content)
    text = markdown(rows, title, found.verdict, config.price, found.better)
    write_atomic(config.out / "comparison.md", text.encode())
    html = page(rows, title, found.verdict, found.better, config.price)
    write_atomic(config.out / "comparison.html", html.encode())


def _name(ref: str) -> str:
    """A name for a title: that of the file, or of its folder where that says more."""
    if ref.startswith("tiny:"):
        return ref
    path = Path(ref)
    if (path.stem in _NAMELESS or set(path.name) & set("*?[")) and path.parent.name:
        path = path.parent
    return path.name


def _as_json(row: MethodFigures, bench: Bench) -> Mapping[str, Any]:
    result = row.result
    taken = [step.name for step in result.steps if bench.done(step.name)]
    return {
        "status": result.status,
        "reason": result.reason,
        "note": result.note,
        "domain_bits_per_byte": _pair(row.domain),
        "domain_change": _pair(row.domain_change),
        "general_bits_per_byte": _pair(row.general),
        "general_change": _pair(row.general_change),
        "task": {name: _pair(value) for name, value in row.task.items()},
        "task_change": {name: _pair(value) for name, value in row.task_change.items()},
        "trust": result.trust,
        "training_flops": result.flops,
        "device_sec": result.sec,
        "device_sec_estimated": result.is_sec_estimated,
        "steps": [step.model_dump(mode="json") for step in result.steps],
        "peak_bytes": result.peak_bytes,
        "peak_bytes_estimated": result.status == "estimated" and result.peak_bytes is not None,
        "artefact_bytes": result.artefact_bytes,
        "use": result.use.model_dump(mode="json") if result.use else None,
        "usd_per_million_tokens": usd_per_million(row, bench.config.price),
        "further_hosts": result.further_hosts,
        "file": f"{FOLDER}/{row.name}.json",
        "step_files": [f"{STEPS}/{name}.json" for name in taken],
    }


def _pair(value: Estimate | None) -> dict[str, float] | None:
    return None if value is None else asdict(value)
