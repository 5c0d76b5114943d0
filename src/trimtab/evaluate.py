"""Measure what an adapter changes on a host: on domain text, on general text, with controls."""

import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from trimtab.backends.hf import HFModel
from trimtab.backends.live import Live
from trimtab.backends.open import open_model
from trimtab.backends.pair import Pair
from trimtab.carriers.head import MountedHead
from trimtab.carriers.recall import MountedMemory
from trimtab.config import EvaluateConfig, MountConfig
from trimtab.errors import InputError
from trimtab.metrics import DocumentScore, Estimate, bootstrap, paired_difference, pool_kinds
from trimtab.mount import mount, mount_with_control
from trimtab.report import ROWS, HostResult, Report, TokenChange, table, write_report
from trimtab.steering.beside import open_beside
from trimtab.steering.kept import VERSION, Kept, read_scores, write_scores
from trimtab.steering.mounted import Mounted
from trimtab.steering.scoring import RowScore, ScoredDocument, Steers, score_document
from trimtab.store.manifest import read_manifest
from trimtab.text.corpus import read_documents, scored_windows
from trimtab.types import Document, Progress, silent

MIN_DOCUMENT_BYTES = 64
"""Shorter documents, and shorter ends of what may be scored, are passed over."""

SMALL_ROWS = ("reference", "expert")
LIVE_ROWS = ("live", "all", "proxy", "proxy-0.5", "mixture")


@dataclass(frozen=True)
class Evaluation:
    """What was measured.

    Attributes:
        report: The figures.
        folder: Where report and scores lie.
        scored: Each document's scores by kind of text; the domain's kind is "".
    """

    report: Report
    folder: Path
    scored: Mapping[str, Sequence[Kept]] = field(default_factory=dict, repr=False)

    def summary(self) -> str:
        """The table, and where the report lies."""
        return f"{table(self.report)}\nreport: {self.folder / 'report.html'}"


def evaluate(
    config: EvaluateConfig, *, host: HFModel | None = None, progress: Progress = silent
) -> Evaluation:
    """Measure every row on held-out domain text and on general text.

    Each document's scores are kept in `out`: an interrupted run goes on where it was, and more
    documents are added to those that are scored already.

    Args:
        config: Adapter, host, texts.
        host: The host, if it is open already. It may differ from the named one (a LoRA in it, a
            preamble), so neither its mount nor its scores are kept.
        progress: Shows the scoring.

    Raises:
        AdapterError: The adapter is broken.
        InputError: A text cannot be read.
        ModelError: A model cannot be opened.
    """
    started = time.perf_counter()
    # All others are compared with the host.
    rows = tuple(dict.fromkeys(("host", *config.rows))) if config.rows else ROWS
    texts = _texts(config)
    cache = host is None
    host = host or open_model(config.host, dtype=config.dtype, progress=progress)
    texts = {
        kind: _cut(documents, _budget(config, kind), config, host)
        for kind, documents in texts.items()
    }
    for kind, documents in texts.items():
        if not documents:
            raise InputError(
                f"the {kind or 'domain'} text has no document of {MIN_DOCUMENT_BYTES} bytes",
                hint="give longer text, or raise --max-tokens",
            )
    settings = MountConfig(
        adapter=config.adapter,
        host=config.host,
        host_keys=config.host_keys,
        seed=config.seed,
        cache=cache,
    )
    bench = _Bench.prepare(config, settings, host, rows, progress)
    scored: dict[str, list[Kept]] = {}
    total = sum(len(document.text.encode()) for found in texts.values() for document in found)
    with progress("scoring", total) as advance:
        for kind, documents in texts.items():
            scored[kind] = []
            for document in documents:
                scored[kind].append(bench.score(document))
                _check_rows(config.rows, scored[""][0])
                advance(len(document.text.encode()))
    scores = {kind: _by_row(kept, rows) for kind, kept in scored.items()}
    first = (texts[""][0].name, scored[""][0].on_host)
    report = _report(config, bench.mounted, scores, first, host)
    tokens = sum(len(kept.on_host.token_ids) for kept in scored[""])
    report = replace(report, hosts=(replace(report.hosts[0], test_tokens=tokens),))
    report = replace(report, wall_sec={"evaluate": time.perf_counter() - started})
    write_report(report, config.out)
    return Evaluation(report, config.out, scored)


def _check_rows(asked: Sequence[str], kept: Kept) -> None:
    missing = [row for row in asked if row not in (kept.on_host.rows.keys() | kept.small.keys())]
    if missing:
        raise InputError(
            f"the adapter has no carrier for the rows {', '.join(missing)}",
            hint="ask for other --rows, or make the carrier with `trimtab fit`",
        )


def _texts(config: EvaluateConfig) -> dict[str, list[Document]]:
    """Domain text under the empty kind, general text by its kind."""
    texts = {"": read_documents(config.data)}
    for asked in config.general:
        kind, _, pattern = asked.rpartition("=")
        kind = kind or Path(pattern).stem
        texts.setdefault(kind, []).extend(read_documents([pattern]))
    return texts


def _budget(config: EvaluateConfig, kind: str) -> int:
    if config.max_tokens is None:
        return 10**9
    return config.max_tokens if kind == "" else config.max_tokens // 4


def _cut(
    documents: Sequence[Document], budget: int, config: EvaluateConfig, host: HFModel
) -> list[Document]:
    """The beginnings of documents that are scored: the same text for every model."""
    kept = []
    for document in documents:
        if document.source is not None and not host.is_encoder_decoder:
            raise InputError(
                f"{document.name} has a source, which {host.ref} cannot read: it is no"
                " encoder-decoder",
                hint="evaluate such a host on text, or take a T5, BART or Marian model as host",
            )
        ids = host.encode(document.text)[: min(config.document_tokens, budget)]
        raw = b"".join(host.vocabulary.token_bytes[i] or b"" for i in ids)
        raw = raw[int(host.vocabulary.prefix_space) :]
        if len(raw) < (MIN_DOCUMENT_BYTES if document.source is None else 1):
            continue
        budget -= len(ids)
        kept.append(replace(document, text=raw.decode("utf-8", "ignore")))
    return kept


@dataclass(frozen=True)
class _Bench:
    """All models of an evaluation, ready."""

    config: EvaluateConfig
    host: HFModel
    mounted: Mounted
    rows: tuple[str, ...]
    steers: Steers
    pair: Pair | None
    keeps: bool

    @staticmethod
    def prepare(
        config: EvaluateConfig,
        settings: MountConfig,
        host: HFModel,
        rows: tuple[str, ...],
        progress: Progress,
    ) -> "_Bench":
        manifest = read_manifest(config.adapter)
        control = None
        if {"head-shuffled", "memory-shuffled"} & set(rows):
            mounted, control = mount_with_control(settings, host, progress=progress)
        else:
            mounted = mount(settings, host=host, progress=progress)
        pair = None
        if manifest.expert and {*LIVE_ROWS, *SMALL_ROWS} & set(rows):
            pair = open_beside(
                manifest,
                config.adapter,
                small=config.small,
                dtype=config.dtype,
                progress=progress,
            )
        steers = Steers(
            rows=rows,
            heads=_heads(mounted, control),
            memories=_memories(mounted, control, rows),
            bias=static_bias(mounted, host) if "bias" in rows else None,
            live=Live(pair, host) if pair and {*LIVE_ROWS} & set(rows) else None,
            blend=manifest.blend,
        )
        return _Bench(config, host, mounted, rows, steers, pair, settings.cache)

    def score(self, document: Document) -> Kept:
        """Score one document under every row, unless it is scored already."""
        path = self.config.out / "scores" / f"{self._key(document)}.safetensors"
        kept = read_scores(path) if self.keeps else None
        if kept is None:
            on_host = score_document(
                self.host,
                document.text,
                self.steers,
                window_tokens=self.config.window_tokens,
                stride_tokens=self.config.stride_tokens,
                source=document.source,
            )
            kept = Kept(on_host, self._alone(document))
            if self.keeps:
                write_scores(path, kept)
        return kept

    def _key(self, document: Document) -> str:
        """Names a document's scores by all that decides them."""
        config, host = self.config, self.host
        files = {path: entry.sha256 for path, entry in self.mounted.manifest.files.items()}
        manifest = self.mounted.manifest.model_dump(mode="json", include={"blend", "carriers"})
        read_by = (str(host.source), str(host.fingerprint), str(host.model.dtype), config.dtype)
        asked = (VERSION, files, manifest, config.host_keys, *read_by)
        how = (sorted(self.rows), config.window_tokens, config.stride_tokens, config.seed)
        text = (document.text,) if document.source is None else (document.text, document.source)
        return hashlib.sha256(json.dumps([*asked, *how, *text]).encode()).hexdigest()[:32]

    def _alone(self, document: Document) -> Mapping[str, DocumentScore]:
        """Reference and expert alone, on their own tokens of the same text; of no source."""
        if self.pair is None or not set(SMALL_ROWS) & set(self.rows):
            return {}
        model = self.pair.reference
        ids, context = model.encode(document.text), model.context_ids()
        # A pair's first token is scored wherever something stands before it.
        begin = 0 if document.source is not None and context else 1
        nats = dict.fromkeys(SMALL_ROWS, 0.0)
        heads = (self.pair.reference_unembedding, self.pair.expert_unembedding)
        config = self.config
        windows = (config.window_tokens, config.stride_tokens)
        for window in scored_windows(len(ids), *windows, first=begin):
            states = self.pair.hidden(torch.tensor([context + ids[window.start : window.end]]))
            first = window.score_from - 1 - window.start + len(context)
            targets = torch.tensor(ids[window.score_from : window.end])
            for row, head, hidden in zip(SMALL_ROWS, heads, states, strict=True):
                with torch.inference_mode():
                    logits = head.logits(hidden[0, first : first + len(targets)]).float()
                    logprobs = logits.log_softmax(-1)
                nats[row] -= float(logprobs.gather(1, targets[:, None]).sum())
        pieces = model.vocabulary.token_bytes
        size = sum(len(pieces[i] or b"") for i in ids[begin:])
        size -= int(begin == 0 and model.vocabulary.prefix_space)
        return {row: DocumentScore(nats[row], size) for row in SMALL_ROWS}


def _heads(mounted: Mounted, control: Mounted | None) -> dict[str, MountedHead]:
    heads = {"head": mounted.head}
    if control and control.head:
        # The static part passes through no map; `bias` is its own control.
        silent_bias = torch.zeros_like(control.head.bias)
        heads["head-shuffled"] = replace(control.head, bias=silent_bias)
    return {name: head for name, head in heads.items() if head}


def _memories(
    mounted: Mounted, control: Mounted | None, rows: Sequence[str]
) -> dict[str, MountedMemory]:
    """The memory; what it finds by bytes alone; and what a shuffled map finds, without bytes."""
    if mounted.memory is None:
        return {}
    memories = {"memory": mounted.memory}
    if "bytes" in rows:
        memories["bytes"] = replace(mounted.memory, finds="bytes")
    if "state" in rows:
        memories["state"] = replace(mounted.memory, finds="state")
    if control and control.memory:
        memories["shuffled"] = replace(control.memory, finds="state")
    return memories


def static_bias(mounted: Mounted, host: HFModel) -> Tensor | None:
    """The control of a static vocabulary bias: how much likelier a token is in the domain.

    log(count in domain + 1) - log(count in general text + 1), both per token, of the memory's
    text against the probe text, in the host's tokens: what any list of words could do.
    """
    if mounted.memory is None:
        return None
    counts = []
    for documents in (mounted.domain_documents, mounted.probe_documents):
        ids = [i for d in documents for i in host.encode(d.decode("utf-8", "ignore"))]
        found = torch.bincount(torch.tensor(ids), minlength=len(host.vocabulary)).float()
        counts.append(((found + 1) / (len(ids) + 1)).log())
    bias = counts[0] - counts[1]
    seen = counts[0] > counts[0].min()
    return torch.where(seen, bias, 0.0)


def _by_row(scored: Sequence[Kept], rows: Sequence[str]) -> dict[str, list[DocumentScore]]:
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


def _report(
    config: EvaluateConfig,
    mounted: Mounted,
    scores: Mapping[str, Mapping[str, list[DocumentScore]]],
    first: tuple[str, ScoredDocument],
    host: HFModel,
) -> Report:
    estimates = {
        kind: {row: bootstrap(found, seed=config.seed) for row, found in by_row.items()}
        for kind, by_row in scores.items()
    }
    kinds = {kind: found for kind, found in estimates.items() if kind}
    general: dict[str, Estimate] = {}
    if kinds:
        for row in estimates[""]:
            general[row] = pool_kinds([found[row] for found in kinds.values()])
    changes = {
        kind: {
            row: paired_difference(found, by_row["host"], seed=config.seed)
            for row, found in by_row.items()
        }
        for kind, by_row in scores.items()
    }
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
        test_bytes=sum(s.scored_bytes for s in scores[""]["host"]),
    )
    sizes = {c: mounted.manifest.bytes_of(c) for c in mounted.manifest.carriers}
    return Report(
        domain=config.domain,
        hosts=(result,),
        wall_sec={},
        adapter_bytes=sizes,
        tokens=_changes(first[1], _shown_row(first[1]), host),
        tokens_name=first[0],
        tokens_row=_shown_row(first[1]),
    )


def _shown_row(scored: ScoredDocument) -> str:
    """The row that needs no second model, as far as it was asked for."""
    shown = (row for row in ("head+memory", "memory", "head", "all", "live") if row in scored.rows)
    return next(shown, "host")


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
