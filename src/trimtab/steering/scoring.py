"""What every way of steering pays for a text, token by token, in one pass of the host."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import final

import torch
from torch import Tensor

from trimtab.backends.hf import HFModel
from trimtab.backends.live import Live, LiveReading
from trimtab.blend import (
    PROXY,
    BlendWeights,
    evidence_weights,
    log_linear,
    mix,
    mixture_logprobs,
)
from trimtab.carriers.head import MountedHead
from trimtab.carriers.memory import last_bytes
from trimtab.carriers.recall import Answer, MountedMemory
from trimtab.steering.rows import TEMPERATURES, families, present, prior_of, with_memory
from trimtab.store.adapter_schema import Blend
from trimtab.text.corpus import scored_windows

CANDIDATE_NATS = 10.0
"""Tokens this far below the likeliest are one tail, which keeps the host's proportions."""

CHUNK = 64
"""Positions whose full-vocabulary logits are held at once."""

BESIDE = "memory beside the small models"
"""A memory that is asked by the reference's own state, where the reference runs anyway."""

CONTROL_BLENDS: Mapping[str, BlendWeights] = {
    "proxy": PROXY,
    "proxy-0.5": BlendWeights(1.0, 0.5, 0.5),
}
"""Blends that are shown for comparison and never weighed by evidence."""


@dataclass(frozen=True)
class Steers:
    """What may steer the host in one pass.

    Attributes:
        rows: Rows to score.
        heads: By predictor: `head`, and `head-shuffled` for the control.
        memories: By predictor: `memory`, its parts `bytes` and `state`, and the control `shuffled`.
        bias: Static vocabulary bias, shape [vocab].
        live: Expert and reference beside the host.
        blend: How predictors are made and weighed.
    """

    rows: tuple[str, ...] = ()
    heads: Mapping[str, MountedHead] = field(default_factory=dict)
    memories: Mapping[str, MountedMemory] = field(default_factory=dict)
    bias: Tensor | None = None
    live: Live | None = None
    blend: Blend = field(default_factory=Blend)

    @cached_property
    def families(self) -> Mapping[str, tuple[str, ...]]:
        """Predictors by row, for the rows that are asked for."""
        found = families(self.blend)
        return {row: found[row] for row in self.rows if row in found}

    @cached_property
    def predictors(self) -> frozenset[str]:
        """All that the rows need."""
        return frozenset(name for names in self.families.values() for name in names)


@dataclass(frozen=True)
class RowScore:
    """What a row makes of a document's tokens.

    Attributes:
        logprobs: Of each token, in nats, shape [tokens].
        top_ids: The row's likeliest token at each place, shape [tokens].
        top_logprobs: How likely the row finds it, shape [tokens].
    """

    logprobs: Tensor
    top_ids: Tensor
    top_logprobs: Tensor


@dataclass(frozen=True)
class ScoredDocument:
    """A document under every row.

    Attributes:
        token_ids: The scored host tokens.
        sizes: Bytes of each.
        rows: By name.
    """

    token_ids: tuple[int, ...]
    sizes: tuple[int, ...]
    rows: Mapping[str, RowScore]


def score_document(
    host: HFModel,
    text: str,
    steers: Steers,
    *,
    window_tokens: int,
    stride_tokens: int,
    source: str | None = None,
) -> ScoredDocument:
    """Score a document under every predictor.

    Args:
        host: The host.
        text: The document.
        steers: What may steer it.
        window_tokens: Window of the measurement.
        stride_tokens: New tokens a window.
        source: What an encoder-decoder reads before it writes the document; its first token is
            then scored too.
    """
    ids = host.encode(text)
    read_source = None if source is None else torch.tensor([host.encode_source(source)])
    begin = 1 if source is None else 0
    pieces = [host.vocabulary.token_bytes[i] or b"" for i in ids]
    if host.vocabulary.prefix_space and pieces:
        # The space that such a tokenizer puts first is not in the text that others read.
        pieces[0] = pieces[0][1:]
    scorer = _Scorer(host, steers)
    for window in scored_windows(len(ids), window_tokens, stride_tokens, first=begin):
        context = host.context_ids()
        read = torch.tensor([context + ids[window.start : window.end]], device=host.device)
        with torch.inference_mode():
            states = host.hidden(read, encoder_ids=read_source)[0]
        skip = len(context) - window.start
        scored = range(window.score_from, window.end)
        before = list(_contexts(pieces, window.start, scored.start, scored.stop))
        reading = None
        if steers.live:
            seen = [ids[window.start : position] for position in scored]
            lasts = [ids[position - 1] if position else None for position in scored]
            reading = steers.live.read(before, host_ids=seen, host_lasts=lasts)
        for first in range(scored.start, scored.stop, CHUNK):
            last = min(first + CHUNK, window.end)
            asked = range(first - scored.start, last - scored.start)
            chunk = _Chunk(
                states[first - 1 + skip : last - 1 + skip],
                torch.tensor(ids[first:last]),
                before[asked.start : asked.stop],
                asked,
                reading,
            )
            with torch.inference_mode():
                scorer.score(chunk)
    return ScoredDocument(
        tuple(ids[begin:]), tuple(len(piece) for piece in pieces[begin:]), scorer.result()
    )


def _contexts(pieces: Sequence[bytes], start: int, first: int, last: int) -> Iterator[bytes]:
    before = b"".join(pieces[start:first])
    for position in range(first, last):
        yield before
        before += pieces[position]


@dataclass(frozen=True)
class _Chunk:
    states: Tensor
    targets: Tensor
    contexts: list[bytes]
    questions: range
    reading: LiveReading | None


@dataclass(frozen=True)
class _Field:
    """Distributions over candidates and, in the last column, all other tokens together."""

    token_ids: Tensor
    logprobs: Tensor
    places: Tensor
    tail_logprobs: Tensor

    def over(self, logits: Tensor) -> Tensor:
        """Log-probabilities of the candidates and the tail, given the logits of all tokens."""
        logprobs = logits[:, self.token_ids] - logits.logsumexp(-1, keepdim=True)
        return torch.cat([logprobs, _tail_logprobs(logprobs)], 1)

    def of_targets(self, logprobs: Tensor) -> Tensor:
        """Log-probability of each target; inside the tail the host's proportions hold."""
        chosen = logprobs.gather(1, self.places[:, None])[:, 0]
        return chosen + self.tail_logprobs


def _field(logits: Tensor, chunk: _Chunk, wanted: Tensor) -> _Field:
    normaliser = logits.logsumexp(-1, keepdim=True)
    likely = (logits > logits.amax(-1, keepdim=True) - CANDIDATE_NATS).any(0)
    likely[wanted] = True
    token_ids = torch.nonzero(likely)[:, 0]
    logprobs = logits[:, token_ids] - normaliser
    tail = _tail_logprobs(logprobs)
    place = torch.full((logits.shape[1],), len(token_ids))
    place[token_ids] = torch.arange(len(token_ids))
    places = place[chunk.targets]
    own = logits.gather(1, chunk.targets[:, None])[:, 0] - normaliser[:, 0] - tail[:, 0]
    inside = torch.where(places == len(token_ids), own, 0.0)
    return _Field(token_ids, torch.cat([logprobs, tail], 1), places, inside)


def _tail_logprobs(logprobs: Tensor) -> Tensor:
    return torch.log1p(-logprobs.exp().sum(-1, keepdim=True).clamp(max=1 - 1e-7))


@final
class _Scorer:
    """Scores a document chunk by chunk, and weighs predictors by what came before."""

    def __init__(self, host: HFModel, steers: Steers) -> None:
        self._host = host
        self._steers = steers
        self._weights: dict[str, Tensor] = {}
        self._parts: dict[str, list[RowScore]] = {}

    def score(self, chunk: _Chunk) -> None:
        """Score the next chunk."""
        field, dense = _predicted(self._host, chunk, self._steers)
        for row, names in self._steers.families.items():
            members = present(row, names, dense)
            if members:
                self._parts.setdefault(row, []).append(self._mixed(row, members, field, dense))

    def _mixed(
        self, row: str, members: Sequence[str], field: _Field, dense: Mapping[str, Tensor]
    ) -> RowScore:
        stacked = torch.stack([dense[name] for name in members])
        logprobs = torch.stack([field.of_targets(part) for part in stacked])
        blend, start = self._steers.blend, self._weights.get(row)
        prior = prior_of(members, blend)
        weights = evidence_weights(logprobs, prior, share=blend.share, start=start)
        self._weights[row], weights = weights[:, -1], weights[:, :-1]
        mixed = mixture_logprobs(stacked, weights[..., None])
        top = mixed[:, :-1].max(-1)
        scores = mixture_logprobs(logprobs.double(), weights)
        return RowScore(scores, field.token_ids[top.indices], top.values)

    def result(self) -> dict[str, RowScore]:
        """All rows that were scored."""
        names = ("logprobs", "top_ids", "top_logprobs")
        return {
            row: RowScore(*(torch.cat([getattr(part, name) for part in parts]) for name in names))
            for row, parts in self._parts.items()
        }


def _predicted(host: HFModel, chunk: _Chunk, steers: Steers) -> tuple[_Field, dict[str, Tensor]]:
    """Every predictor's distributions over the candidates and the tail."""
    before = last_bytes(chunk.contexts)
    states = chunk.states.float().cpu()
    answers = {name: memory.ask(states, before) for name, memory in steers.memories.items()}
    if "memory" in answers and chunk.reading and "all" in steers.rows:
        small = chunk.reading.reference_states(chunk.questions)
        answers[BESIDE] = steers.memories["memory"].ask(states, before, small)
    proposed = [answer.values[answer.values >= 0] for answer in answers.values()]
    weight = host.unembedding.weight
    logits = host.unembedding.logits(chunk.states.to(weight.device)).float().cpu()
    field = _field(logits, chunk, torch.cat([torch.zeros(0, dtype=torch.long), *proposed]).unique())
    dense: dict[str, Tensor] = {"host": field.logprobs}
    for temperature in TEMPERATURES:
        name = f"temperature-{temperature:g}"
        if name in steers.predictors:
            dense[name] = field.over(logits / temperature)
    for name, head in steers.heads.items():
        dense[name] = _shifted(field, head.shift_of(states, field.token_ids))
    if steers.bias is not None:
        shift = steers.bias[field.token_ids].expand(len(states), -1)
        dense["bias-half"] = _shifted(field, 0.5 * shift)
        dense["bias-full"] = _shifted(field, shift)
    if steers.live and chunk.reading:
        dense |= _live(field, chunk.reading, chunk.questions, steers.live, steers.blend)
    for name, answer in answers.items():
        dense |= _remembered(field, dense, name, answer, steers)
    return field, dense


def _shifted(field: _Field, shift: Tensor) -> Tensor:
    shifted = field.logprobs.clone()
    shifted[:, :-1] += shift
    return shifted.log_softmax(-1)


def _remembered(
    field: _Field, dense: Mapping[str, Tensor], name: str, answer: Answer, steers: Steers
) -> dict[str, Tensor]:
    """A memory mixed into the predictors that it belongs to, as far as they are there."""
    place = torch.full((max(int(answer.values.max()), 0) + 1,), -1)
    inside = field.token_ids[field.token_ids < len(place)]
    place[inside] = torch.arange(len(inside))
    local = answer.relabelled(place)
    said = local.probs(field.logprobs.shape[1]).log()
    bases = {"memory": ("host", "head"), BESIDE: steers.blend.live_with_memory}
    found = {}
    for base in bases.get(name, ("host",)):
        shifts = with_memory(base, steers.blend)
        names = [n if name == BESIDE else n.replace("memory", name) for n in shifts]
        if base not in dense or not steers.predictors & set(names):
            continue
        gates = local.gates(dense[base], tuple(shifts.values()))
        for predictor, gate in zip(names, gates, strict=True):
            # Entries whose continuation no host token begins leave their share unused.
            found[predictor] = mix(dense[base], said, gate[:, None]).log_softmax(-1)
    return found


def _live(
    field: _Field, reading: LiveReading, questions: range, live: Live, blend: Blend
) -> dict[str, Tensor]:
    host = field.logprobs[:, :-1].exp()
    pair = live.score(reading, questions, host, field.token_ids)
    expert, reference = (with_tail(probs) for probs in pair)
    blends = {name: BlendWeights(*by) for name, by in blend.live.items()} | dict(CONTROL_BLENDS)
    found = {name: log_linear(field.logprobs, expert, reference, by) for name, by in blends.items()}
    half = torch.full((len(host), 1), 0.5)
    return found | {"mixture": mix(field.logprobs, expert, half)}


def tail_of(probs: Tensor) -> Tensor:
    """What the candidates leave to all other tokens, above 0, shape [rows, 1]."""
    return (1.0 - probs.sum(-1, keepdim=True)).clamp_min(1e-9)


def with_tail(probs: Tensor) -> Tensor:
    """Log-probabilities of candidates and, last, of all other tokens: [rows, candidates + 1]."""
    full = torch.cat([probs.clamp_min(1e-12), tail_of(probs)], 1)
    return (full / full.sum(-1, keepdim=True)).log()
