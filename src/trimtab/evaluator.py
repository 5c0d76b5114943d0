"""The models of an evaluation, and what they make of a document."""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import final

import torch
from torch import Tensor

from trimtab.backends.hf import HFModel
from trimtab.backends.live import Live
from trimtab.backends.pair import Pair, PairStates
from trimtab.backends.reading import OwnReading
from trimtab.carriers.head import MountedHead
from trimtab.carriers.recall import MountedMemory
from trimtab.config import EvaluateConfig, MountConfig
from trimtab.metrics import DocumentScore
from trimtab.mount import mount, mount_with_control
from trimtab.steering.beside import open_beside
from trimtab.steering.kept import VERSION, Kept, read_scores, write_scores
from trimtab.steering.mounted import Mounted
from trimtab.steering.predictors import Steering
from trimtab.steering.rows import LIVE_ROWS, SMALL_ROWS, blend_on
from trimtab.steering.scoring import score_document
from trimtab.store.manifest import read_manifest
from trimtab.text.corpus import scored_windows
from trimtab.types import Document, Progress


@final
@dataclass(frozen=True)
class Evaluator:
    """All models of an evaluation, ready to score documents.

    Attributes:
        config: What is evaluated, and how.
        host: The host.
        mounted: The adapter on it.
        rows: Rows to score.
        steering: What may steer the host.
        pair: Expert and reference, where a row needs them.
        keeps: Whether scores are kept in the folder of the evaluation.
    """

    config: EvaluateConfig
    host: HFModel
    mounted: Mounted
    rows: tuple[str, ...]
    steering: Steering
    pair: Pair | None
    keeps: bool

    @staticmethod
    def prepare(
        config: EvaluateConfig,
        settings: MountConfig,
        host: HFModel,
        rows: tuple[str, ...],
        progress: Progress,
    ) -> "Evaluator":
        """Mount the adapter, its control where a row needs it, and open the small models.

        Args:
            config: What is evaluated, and how.
            settings: How to mount.
            host: The host.
            rows: Rows to score.
            progress: Shows the mounting and the opening.
        """
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
        steering = Steering(
            rows=rows,
            heads=_heads(mounted, control),
            memories=_memories(mounted, control, rows),
            bias=static_bias(mounted, host) if "bias" in rows else None,
            live=Live(pair, host) if pair and {*LIVE_ROWS} & set(rows) else None,
            blend=blend_on(manifest.blend, reads_source=host.is_encoder_decoder),
        )
        return Evaluator(config, host, mounted, rows, steering, pair, settings.cache)

    @property
    def is_shared(self) -> bool:
        """Copies of this process may score too: it is torch that computes, and scores are kept."""
        models = (self.host, *([self.pair.reference] if self.pair else []))
        return self.keeps and not any(model.has_own_logits for model in models)

    def score(self, document: Document) -> Kept:
        """Score one document under every row, unless it is scored already."""
        path = self.config.out / "scores" / f"{self._key(document)}.safetensors"
        kept = read_scores(path) if self.keeps else None
        if kept is None:
            on_host = score_document(
                self.host,
                document.text,
                self.steering,
                window_tokens=self.config.window_tokens,
                stride_tokens=self.config.stride_tokens,
                source=document.source,
            )
            kept = Kept(on_host, self._alone(document, on_host.own))
            if self.keeps:
                write_scores(path, kept)
        return kept

    def _key(self, document: Document) -> str:
        """Names a document's scores by all that decides them."""
        config, asked = self.config, self.models_key
        how = (sorted(self.rows), config.window_tokens, config.stride_tokens, config.seed)
        text = (document.text,) if document.source is None else (document.text, document.source)
        return hashlib.sha256(json.dumps([*asked, *how, *text]).encode()).hexdigest()[:32]

    @property
    def models_key(self) -> tuple[object, ...]:
        """Names the adapter, the host, and the arithmetic of both."""
        config, host = self.config, self.host
        files = {path: entry.sha256 for path, entry in self.mounted.manifest.files.items()}
        manifest = self.mounted.manifest.model_dump(mode="json", include={"blend", "carriers"})
        read_by = (str(host.source), str(host.fingerprint), str(host.model.dtype), config.dtype)
        return (VERSION, files, manifest, config.host_keys, *read_by)

    def _alone(self, document: Document, own: OwnReading | None) -> Mapping[str, DocumentScore]:
        """Reference and expert alone, on their own tokens of the same text; of no source."""
        if self.pair is None or not set(SMALL_ROWS) & set(self.rows):
            return {}
        model = self.pair.reference
        ids = model.encode(document.text)
        # A pair's first token is scored wherever something stands before it.
        begin = 0 if document.source is not None and model.context_ids() else 1
        nats = dict.fromkeys(SMALL_ROWS, 0.0)
        heads = (self.pair.reference_unembedding, self.pair.expert_unembedding)
        for targets, states in self._read_alone(ids, begin, own):
            for row, head, hidden in zip(SMALL_ROWS, heads, states, strict=True):
                with torch.inference_mode():
                    logprobs = head.logits(hidden).float().log_softmax(-1)
                chosen = targets[:, None].to(logprobs.device)
                nats[row] -= float(logprobs.gather(1, chosen).sum())
        pieces = model.vocabulary.token_bytes
        size = sum(len(pieces[i] or b"") for i in ids[begin:])
        size -= int(begin == 0 and model.vocabulary.prefix_space)
        return {row: DocumentScore(nats[row], size) for row in SMALL_ROWS}

    def _read_alone(
        self, ids: list[int], begin: int, own: OwnReading | None
    ) -> Iterator[tuple[Tensor, PairStates]]:
        """The tokens from `begin` on, and the states before each, some at a time."""
        assert self.pair is not None
        if own is not None and own.token_ids[-len(ids) :] == ids:
            before = slice(len(own.token_ids) - len(ids) + begin - 1, -1)
            yield torch.tensor(ids[begin:]), PairStates(*(side[before] for side in own.states))
            return
        context = self.pair.reference.context_ids()
        windows = (self.config.window_tokens, self.config.stride_tokens)
        for window in scored_windows(len(ids), *windows, first=begin):
            states = self.pair.hidden(torch.tensor([context + ids[window.start : window.end]]))
            first = window.score_from - 1 - window.start + len(context)
            targets = torch.tensor(ids[window.score_from : window.end])
            some = slice(first, first + len(targets))
            yield targets, PairStates(*(side[0, some] for side in states))


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
