"""What every way of steering pays for a text, token by token, in one pass of the host."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trimtab.backends.hf import HFModel
from trimtab.backends.live import Live, LiveReading
from trimtab.blend import PROXY, BlendWeights, evidence_weights, log_linear, mix, mixture_logprobs
from trimtab.carriers.head import MountedHead
from trimtab.carriers.memory import Answer, MountedMemory, last_bytes
from trimtab.text.corpus import scored_windows

CANDIDATE_NATS = 10.0
"""Tokens this far below the likeliest are one tail, which keeps the host's proportions."""

CHUNK = 64
"""Positions whose full-vocabulary logits are held at once."""

LIVE_BLENDS: Mapping[str, BlendWeights] = {
    "expert-aligned": BlendWeights(0.0, 1.0, 0.0),
    "blend": BlendWeights(0.5, 1.0, 0.5),
    "mean": BlendWeights(0.5, 0.5, 0.0),
    "proxy": PROXY,
    "lean": BlendWeights(0.3, 0.9, 0.2),
}

FAMILIES: Mapping[str, tuple[str, ...]] = {
    "head": ("host", "head"),
    "memory": ("host", "memory"),
    "head+memory": ("host", "head", "memory", "head+memory"),
    "head-shuffled": ("host", "head-shuffled"),
    "memory-shuffled": ("host", "memory-shuffled"),
    "bias": ("host", "bias-half", "bias-full"),
    "live": ("host", "expert-aligned", "blend", "mean", "lean"),
    "all": (
        "host",
        "head+memory",
        "expert-aligned",
        "blend",
        "mean",
        "lean",
        "blend+memory",
        "lean+memory",
    ),
    "proxy": ("proxy",),
    "host": ("host",),
}
"""Predictors that each row weighs by the evidence of the text so far."""


@dataclass(frozen=True)
class Steers:
    """What may steer the host in one pass; None and absent ones are passed over.

    Attributes:
        head: The mounted head.
        memory: The mounted memory.
        shuffled_head: The control with a shuffled map.
        shuffled_memory: Likewise.
        bias: Static vocabulary bias, shape [vocab].
        live: Expert and reference beside the host.
    """

    head: MountedHead | None = None
    memory: MountedMemory | None = None
    shuffled_head: MountedHead | None = None
    shuffled_memory: MountedMemory | None = None
    bias: Tensor | None = None
    live: Live | None = None


@dataclass(frozen=True)
class ScoredDocument:
    """Log-probabilities of a document's tokens under each predictor.

    Attributes:
        token_ids: The scored host tokens.
        sizes: Bytes of each.
        logprobs: By predictor, shape [tokens], in nats.
        top_ids: Each row's likeliest token for some predictors, by predictor, shape [tokens].
    """

    token_ids: tuple[int, ...]
    sizes: tuple[int, ...]
    logprobs: Mapping[str, Tensor]
    top_ids: Mapping[str, Tensor]

    def row(self, name: str) -> Tensor:
        """Log-probabilities of a row: its predictors, weighed by the evidence so far."""
        members = [m for m in FAMILIES[name] if m in self.logprobs]
        stacked = torch.stack([self.logprobs[m] for m in members]).double()
        if len(members) == 1:
            return stacked[0]
        weights = evidence_weights(stacked, prior_of(members), share=SHARE)[:, :-1]
        return mixture_logprobs(stacked, weights)


SHARE = 0.01
"""Part of the evidence that is dealt out anew at each token, so that a text may turn."""


def prior_of(members: Sequence[str]) -> Tensor:
    """Trust before any evidence: a quarter in the bare host, the rest shared."""
    others = len(members) - 1
    return torch.tensor([0.25 if m == "host" else 0.75 / others for m in members])


def score_document(
    host: HFModel,
    text: str,
    steers: Steers,
    *,
    window_tokens: int,
    stride_tokens: int,
) -> ScoredDocument:
    """Score a document under every predictor.

    Args:
        host: The host.
        text: The document.
        steers: What may steer it.
        window_tokens: Window of the measurement.
        stride_tokens: New tokens a window.
    """
    ids = host.encode(text)
    pieces = [host.vocabulary.token_bytes[i] or b"" for i in ids]
    parts = []
    for window in scored_windows(len(ids), window_tokens, stride_tokens):
        context = host.context_ids()
        read = torch.tensor([context + ids[window.start : window.end]], device=host.device)
        with torch.inference_mode():
            states = host.hidden(read)[0]
        skip = len(context) - window.start
        scored = range(window.score_from, window.end)
        before = list(_contexts(pieces, window.start, scored.start, scored.stop))
        reading = steers.live.read(before) if steers.live else None
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
                parts.append(_score_chunk(host, chunk, steers))
    names = parts[0][0].keys() if parts else ()
    return ScoredDocument(
        tuple(ids[1:]),
        tuple(len(piece) for piece in pieces[1:]),
        {name: torch.cat([part[0][name] for part in parts]) for name in names},
        {n: torch.cat([part[1][n] for part in parts]) for n in (parts[0][1] if parts else ())},
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

    def of_targets(self, logprobs: Tensor) -> Tensor:
        """Log-probability of each target; inside the tail the host's proportions hold."""
        chosen = logprobs.gather(1, self.places[:, None])[:, 0]
        return chosen + self.tail_logprobs


def _field(host: HFModel, chunk: _Chunk, wanted: Tensor) -> _Field:
    logits = host.unembedding.logits(chunk.states).float().cpu()
    normaliser = logits.logsumexp(-1, keepdim=True)
    likely = (logits > logits.amax(-1, keepdim=True) - CANDIDATE_NATS).any(0)
    likely[wanted] = True
    token_ids = torch.nonzero(likely)[:, 0]
    logprobs = logits[:, token_ids] - normaliser
    tail = torch.log1p(-logprobs.exp().sum(-1, keepdim=True).clamp(max=1 - 1e-7))
    place = torch.full((logits.shape[1],), len(token_ids))
    place[token_ids] = torch.arange(len(token_ids))
    places = place[chunk.targets]
    own = logits.gather(1, chunk.targets[:, None])[:, 0] - normaliser[:, 0] - tail[:, 0]
    inside = torch.where(places == len(token_ids), own, 0.0)
    return _Field(token_ids, torch.cat([logprobs, tail], 1), places, inside)


def _score_chunk(
    host: HFModel, chunk: _Chunk, steers: Steers
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    before = last_bytes(chunk.contexts)
    states = chunk.states.float().cpu()
    answers = {
        name: memory.ask(states, before)
        for name, memory in (
            ("memory", steers.memory),
            ("memory-shuffled", steers.shuffled_memory),
        )
        if memory
    }
    proposed = [answer.values[answer.values >= 0] for answer in answers.values()]
    field = _field(host, chunk, torch.cat([torch.zeros(0, dtype=torch.long), *proposed]).unique())
    dense: dict[str, Tensor] = {"host": field.logprobs}
    for name, head in (("head", steers.head), ("head-shuffled", steers.shuffled_head)):
        if head:
            dense[name] = _shifted(field, head.shift_of(states, field.token_ids))
    if steers.bias is not None:
        shift = steers.bias[field.token_ids].expand(len(states), -1)
        dense["bias-half"] = _shifted(field, 0.5 * shift)
        dense["bias-full"] = _shifted(field, shift)
    if steers.live and chunk.reading:
        dense |= _live(field, chunk.reading, chunk.questions, steers.live)
    steered_by_memory = {
        "memory": ("host", "memory"),
        "head+memory": ("head", "memory"),
        "memory-shuffled": ("host", "memory-shuffled"),
        "blend+memory": ("blend", "memory"),
        "lean+memory": ("lean", "memory"),
    }
    gate = steers.memory.memory.gate if steers.memory else ()
    for name, (base, which) in steered_by_memory.items():
        if base in dense and which in answers:
            dense[name] = _with_memory(field, dense[base], answers[which], gate)
    scores = {name: field.of_targets(logprobs) for name, logprobs in dense.items()}
    shown = {n: _top(field, dense[n]) for n in ("host", "head+memory", "blend") if n in dense}
    return scores, shown


def _top(field: _Field, logprobs: Tensor) -> Tensor:
    return field.token_ids[logprobs[:, :-1].argmax(-1)]


def _shifted(field: _Field, shift: Tensor) -> Tensor:
    shifted = field.logprobs.clone()
    shifted[:, :-1] += shift
    return shifted.log_softmax(-1)


def _with_memory(
    field: _Field, logprobs: Tensor, answer: Answer, gate: tuple[float, ...]
) -> Tensor:
    place = torch.full((max(int(answer.values.max()), 0) + 1,), -1)
    inside = field.token_ids[field.token_ids < len(place)]
    place[inside] = torch.arange(len(inside))
    local = answer.relabelled(place)
    opened = local.gate(logprobs, gate)
    return mix(logprobs, local.probs(logprobs.shape[1]).log(), opened[:, None])


def _live(field: _Field, reading: LiveReading, questions: range, live: Live) -> dict[str, Tensor]:
    host = field.logprobs[:, :-1].exp()
    pair = live.score(reading, questions, host, field.token_ids)
    expert, reference = (with_tail(probs) for probs in pair)
    return {
        name: log_linear(field.logprobs, expert, reference, by) for name, by in LIVE_BLENDS.items()
    }


def tail_of(probs: Tensor) -> Tensor:
    """What the candidates leave to all other tokens, above 0, shape [rows, 1]."""
    return (1.0 - probs.sum(-1, keepdim=True)).clamp_min(1e-9)


def with_tail(probs: Tensor) -> Tensor:
    """Log-probabilities of candidates and, last, of all other tokens: [rows, candidates + 1]."""
    full = torch.cat([probs.clamp_min(1e-12), tail_of(probs)], 1)
    return (full / full.sum(-1, keepdim=True)).log()
