"""What a mounted adapter makes of a host's next-token scores, whatever runs the host."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import final

import torch
from torch import Tensor

from trimtab.backends.live import Live
from trimtab.backends.reading import LiveReading, PairProbs
from trimtab.blend import PROXY, BlendWeights, log_linear, mix
from trimtab.carriers.head import MountedHead
from trimtab.carriers.memory import last_bytes
from trimtab.carriers.recall import Answer, MountedMemory
from trimtab.steering.field import LEAST_LOGPROB, Field
from trimtab.steering.pieces import Pieces, at_once
from trimtab.steering.rows import TEMPERATURES, families, with_memory
from trimtab.store.adapter_schema import Blend

BESIDE = "memory beside the small models"
"""A memory that is asked by the reference's own state, where the reference runs anyway."""

CONTROL_BLENDS: Mapping[str, BlendWeights] = {
    "proxy": PROXY,
    "proxy-0.5": BlendWeights(1.0, 0.5, 0.5),
}
"""Blends that are shown for comparison and never weighed by evidence."""

_GATE_LIMIT = 1 - 1e-6


@dataclass(frozen=True)
class Rows:
    """Positions at which a host is about to choose a token.

    Attributes:
        logits: The host's own, after cap and scale, shape [rows, vocab].
        hidden: The states that gave them, shape [rows, hidden].
        contexts: All bytes of text before each row's next token; in a chat, of the message and the
            answer.
        questions: How the expert has read the contexts: readings with the questions asked of each,
            one after another one a row; empty without an expert.
        strangers: As for `Field.of`.
    """

    logits: Tensor
    hidden: Tensor
    contexts: Sequence[bytes]
    questions: Sequence[tuple[LiveReading, range]] = ()
    strangers: bool = False


@final
@dataclass(frozen=True)
class Steering:
    """What may steer a host, and in which ways (rows of `evaluate`).

    Each row weighs several predictors against each other, the bare host among them.

    Attributes:
        rows: The ways; one where text is generated.
        heads: By predictor: `head`, and `head-shuffled` for the control.
        memories: By predictor: `memory`, its parts `bytes` and `state`, and the control `shuffled`.
        bias: Static vocabulary bias, shape [vocab].
        live: Expert and reference beside the host.
        blend: How predictors are made and weighed.
        strength: How far to follow the carriers, in [0, 2]; multiplies the head's shift, the
            memory's gate, and each blend's distance from the host alone.
        own: Host tokens that keep the host's own probability, whatever steers: True for them,
            shape [vocab]; None for no such rule.
    """

    rows: tuple[str, ...] = ()
    heads: Mapping[str, MountedHead] = field(default_factory=dict)
    memories: Mapping[str, MountedMemory] = field(default_factory=dict)
    bias: Tensor | None = None
    live: Live | None = None
    blend: Blend = field(default_factory=Blend)
    strength: float = 1.0
    own: Tensor | None = None

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
class Predicted:
    """What each predictor says of some next tokens.

    Attributes:
        field: The tokens that they tell apart.
        logprobs: By predictor natural-log probabilities over the field, each of shape
            [rows, candidates + 1], summing to one.
        answers: What each memory found; `BESIDE` where the reference's own state asked.
    """

    field: Field
    logprobs: Mapping[str, Tensor]
    answers: Mapping[str, Answer]


def predicted(steering: Steering, rows: Rows) -> Predicted:
    """What each predictor says of the next tokens.

    Args:
        steering: What may steer.
        rows: What is asked.
    """
    return at_once(predicting(steering, rows))


def predicting(steering: Steering, rows: Rows, few: int | None = None) -> Pieces[Predicted]:
    """As `predicted`, in pieces.

    The rows share their candidates whatever the pieces: what is found is the same.

    Args:
        steering: What may steer.
        rows: What is asked.
        few: Ask the small models about at most so many rows in a piece (default: about all).
    """
    # The search over keys runs on the CPU, and so does what heads add to a few candidates.
    states = rows.hidden.float().cpu()
    answers = _answers(steering, rows, states)
    wanted = [answer.values[answer.values >= 0] for answer in answers.values()]
    if steering.live:
        wanted += [steering.live.expected(*question) for question in rows.questions]
    wanted.append(torch.zeros(0, dtype=torch.long))
    field = Field.of(rows.logits, torch.cat(wanted).unique(), strangers=rows.strangers)
    dense = {"host": field.logprobs} | _alone(steering, field, states)
    if steering.live and rows.questions:
        dense |= yield from _live(steering, steering.live, field, rows, few)
    for name, answer in answers.items():
        dense |= _remembered(steering, field, dense, name, answer)
    return Predicted(field, dense, answers)


def _answers(steering: Steering, rows: Rows, states: Tensor) -> dict[str, Answer]:
    """What each memory proposes."""
    before = last_bytes(rows.contexts)
    answers = {name: memory.ask(states, before) for name, memory in steering.memories.items()}
    bases = steering.blend.live_with_memory
    beside = {name for base in bases for name in with_memory(base, steering.blend)}
    if "memory" in answers and rows.questions and beside & steering.predictors:
        # Where the reference runs anyway its own state asks, which no map blurs.
        small = [s for reading, asked in rows.questions for s in reading.reference_states(asked)]
        answers[BESIDE] = steering.memories["memory"].ask(states, before, small)
    return answers


def _alone(steering: Steering, field: Field, states: Tensor) -> dict[str, Tensor]:
    """Predictors that need neither memory nor small model."""
    temperatures = {f"temperature-{t:g}": t for t in TEMPERATURES}
    found = {
        name: field.tempered(temperature)
        for name, temperature in temperatures.items()
        if name in steering.predictors
    }
    for name, head in steering.heads.items():
        found[name] = field.shifted(steering.strength * head.shift_of(states, field.token_ids))
    if steering.bias is not None:
        shift = steering.bias[field.token_ids].expand(len(states), -1)
        found["bias-half"], found["bias-full"] = field.shifted(0.5 * shift), field.shifted(shift)
    return found


def _live(
    steering: Steering, live: Live, field: Field, rows: Rows, few: int | None
) -> Pieces[dict[str, Tensor]]:
    """Every blend of host, expert and reference."""
    known = live.alignment.is_known[field.token_ids]
    host = of_text(field.logprobs, known)
    host_probs, token_ids = host[:, :-1].exp(), field.token_ids[known]
    found, done = [], 0
    for questions in _in_pieces(rows.questions, few):
        yield
        some = host_probs[done : done + sum(len(asked) for _, asked in questions)]
        found.append(live.score_all(questions, some, token_ids))
        done += len(some)
    pair = PairProbs(*(torch.cat(side).float() for side in zip(*found, strict=True)))
    return live_blends(steering, field.logprobs, known, pair)


def of_text(logprobs: Tensor, known: Tensor) -> Tensor:
    """A host's log-probabilities over tokens of text and the tail, given that text goes on.

    Args:
        logprobs: Of candidates and, last, the tail, shape [rows, candidates + 1].
        known: Which candidates are text to the small models, shape [candidates].

    Returns:
        Shape [rows, known candidates + 1].
    """
    return logprobs[:, _with_tail_column(known)].log_softmax(-1)


def live_blends(
    steering: Steering, logprobs: Tensor, known: Tensor, pair: PairProbs
) -> dict[str, Tensor]:
    """Every blend of a host with expert and reference.

    Tokens that stand for no text (the end, above all) keep the host's own probability: the pair
    says nothing of them.

    Args:
        steering: The blends.
        logprobs: The host's, of candidates and the tail, shape [rows, candidates + 1].
        known: Which candidates are text to the small models, shape [candidates].
        pair: Expert and reference over these, each of shape [rows, known candidates].

    Returns:
        By predictor, of `logprobs`' shape.
    """
    is_text = _with_tail_column(known)
    text = logprobs[:, is_text]
    mass = text.logsumexp(-1, keepdim=True)
    host = text - mass
    expert, reference = (_with_tail(probs) for probs in pair)
    by_name = {name: BlendWeights(*by) for name, by in steering.blend.live.items()}
    blends = {
        name: log_linear(host, expert, reference, blend_at(by, steering.strength))
        for name, by in (by_name | dict(CONTROL_BLENDS)).items()
        if name in steering.predictors
    }
    if "mixture" in steering.predictors:
        blends["mixture"] = mix(host, expert, torch.full((len(host), 1), 0.5))
    # Beyond strength 1 the host's exponent may be below 0, which would prefer the impossible.
    impossible = text <= LEAST_LOGPROB
    found = {}
    for name, blended in blends.items():
        blended = blended.masked_fill(impossible, -torch.inf).log_softmax(-1)
        found[name] = logprobs.clone()
        found[name][:, is_text] = (blended + mass).clamp_min(LEAST_LOGPROB)
    return found


def _with_tail_column(known: Tensor) -> Tensor:
    return torch.cat([known, torch.ones(1, dtype=torch.bool)])


def _in_pieces(
    questions: Sequence[tuple[LiveReading, range]], few: int | None
) -> list[Sequence[tuple[LiveReading, range]]]:
    if few is None:
        return [questions]
    return [
        [(reading, asked[first : first + few])]
        for reading, asked in questions
        for first in range(0, len(asked), few)
    ]


def _with_tail(probs: Tensor) -> Tensor:
    """Log-probabilities of candidates and, last, of all other tokens: [rows, candidates + 1]."""
    tail = (1.0 - probs.double().sum(-1, keepdim=True)).clamp_min(1e-9).float()
    full = torch.cat([probs.clamp_min(1e-12), tail], 1)
    return (full / full.sum(-1, keepdim=True)).log()


def _remembered(
    steering: Steering, field: Field, dense: Mapping[str, Tensor], name: str, answer: Answer
) -> dict[str, Tensor]:
    """A memory mixed into the predictors that it belongs to, as far as they are there."""
    place = torch.full((max(int(answer.values.max()), 0) + 1,), -1)
    inside = field.token_ids[field.token_ids < len(place)]
    place[inside] = torch.arange(len(inside))
    local = answer.relabelled(place)
    said = local.probs(field.logprobs.shape[1]).log()
    blend = steering.blend
    bases = {"memory": ("host", "head"), BESIDE: blend.live_with_memory}
    found = {}
    for base in bases.get(name, ("host",)):
        shifts = with_memory(base, blend)
        names = [n if name == BESIDE else n.replace("memory", name) for n in shifts]
        if base not in dense or not steering.predictors & set(names):
            continue
        gates = local.gates(
            dense[base], tuple(shifts.values()), tail_entropy_nats=field.tail_entropy_nats
        )
        for predictor, gate in zip(names, gates, strict=True):
            followed = (steering.strength * gate).clamp(max=_GATE_LIMIT)[:, None]
            # Entries whose continuation no host token begins leave their share unused.
            found[predictor] = mix(dense[base], said, followed).log_softmax(-1)
    return found


def blend_at(weights: BlendWeights, strength: float) -> BlendWeights:
    """Go from the host alone (strength 0) through a blend (1) and beyond it."""
    return BlendWeights(
        1.0 + strength * (weights.host - 1.0),
        strength * weights.expert,
        strength * weights.reference,
    )
