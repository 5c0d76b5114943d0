"""Who decided a token: what the host alone, and what each carrier, had to do with it. Pure."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from trimtab.carriers.memory import Memory, sources_of
from trimtab.carriers.sources import place_of
from trimtab.steering.predictors import BESIDE, Predicted
from trimtab.steering.rows import base_of
from trimtab.store.adapter_schema import Blend

Decider = Literal["host", "head", "memory", "expert"]

DECIDERS: tuple[Decider, ...] = ("host", "head", "memory", "expert")
"""Of two that have an equal part in a token, the earlier one decided it."""

CANDIDATES, NEIGHBOURS = 5, 5
"""How many of the likeliest are told."""

BEFORE_BYTES, AFTER_BYTES = 96, 64
"""Text of a neighbour that is told on each side of its place."""


@dataclass(frozen=True)
class Neighbour:
    """An entry of a memory that was near.

    Attributes:
        source: Name of its document.
        line: Line of the document, counted from 1, in which what followed begins.
        before: The text before it.
        after: What followed.
        weight: Its share of what the memory says, in [0, 1].
    """

    source: str
    line: int
    before: str
    after: str
    weight: float


@dataclass(frozen=True)
class Explanation:
    """How a token came about.

    Attributes:
        text: The token's text.
        by: Who had the largest part in its probability (`parts`).
        moved_nats: How far steering moved the distribution (`moved_nats`).
        before: The host's likeliest tokens and their probabilities, likeliest first.
        after: The same of the steered distribution.
        neighbours: What the memory found, nearest first; empty without a memory.
    """

    text: str
    by: Decider
    moved_nats: float
    before: tuple[tuple[str, float], ...]
    after: tuple[tuple[str, float], ...]
    neighbours: tuple[Neighbour, ...] = ()

    def as_json(self) -> dict[str, Any]:
        """The same as JSON has it."""
        return asdict(self)


@dataclass(frozen=True)
class Voice:
    """What the predictors of one adapter said of one token.

    Attributes:
        blend: The adapter's.
        weights: Trust in each predictor by name; over all voices they sum to one.
        found: What they said of some rows.
        row: The row that is meant.
        memory: The memory, if it was asked and its text may be told.
    """

    blend: Blend
    weights: Mapping[str, float]
    found: Predicted
    row: int = 0
    memory: Memory | None = None


def moved_nats(host_logprobs: Tensor, steered_logprobs: Tensor) -> float:
    """How far steering moved a distribution: KL(steered || host) in nats, at least 0.

    What it costs, on average, to write down tokens that the steered distribution draws as the
    host would have expected them: 0 where nothing was moved, ln 2 where a choice between two
    equally likely tokens was made. In this direction, since a token that steering rules out costs
    it nothing, while one that the host would hardly have said counts in full.

    Args:
        host_logprobs: Natural-log probabilities, shape [vocab]; finite where the other is.
        steered_logprobs: The same after steering, shape [vocab].
    """
    is_possible = ~steered_logprobs.isneginf()
    steered = steered_logprobs[is_possible].double()
    host = host_logprobs[is_possible].double()
    return max(0.0, float((steered.exp() * (steered - host)).sum()))


def parts(
    logprobs: Mapping[str, float], weights: Mapping[str, float], blend: Blend
) -> dict[Decider, float]:
    """What each carrier, and the host, has in the probability that a token got.

    A mixture gives a token sum_k w_k p_k(token). Each predictor k was made from another one, its
    base, by one carrier: of p_k the carrier has what exceeds the base's p, and the rest is the
    base's, part for part. So a carrier is not credited with what would have been said without
    it, and the parts sum to the token's probability.

    Args:
        logprobs: What each predictor, and the base of each, gave to the token, in nats.
        weights: Trust in each predictor.
        blend: Says which predictor was made from which.
    """
    probs = {name: float(torch.tensor(value).double().exp()) for name, value in logprobs.items()}
    found: dict[Decider, float] = dict.fromkeys(DECIDERS, 0.0)
    for name, weight in weights.items():
        for decider, part in _parts_of(name, probs, blend).items():
            found[decider] += weight * part
    return found


def _parts_of(name: str, probs: Mapping[str, float], blend: Blend) -> dict[Decider, float]:
    made = base_of(name, blend)
    if made is None:
        return {"host": probs[name]}
    base, carrier = made
    kept = min(probs[name], probs[base]) / max(probs[base], 1e-300)
    found: dict[Decider, float] = {
        decider: kept * part for decider, part in _parts_of(base, probs, blend).items()
    }
    found[carrier] = found.get(carrier, 0.0) + max(0.0, probs[name] - probs[base])
    return found


def explain(
    token_id: int,
    text: str,
    logprobs: tuple[Tensor, Tensor],
    voices: Sequence[Voice],
    spell: Callable[[int], str],
) -> Explanation:
    """Say how a token came about.

    Args:
        token_id: The token.
        text: Its text.
        logprobs: Natural-log probabilities of the host alone and after steering, [vocab] each.
        voices: What each adapter said; none where the host alone writes.
        spell: The text of any token.
    """
    host, steered = logprobs
    found: dict[Decider, float] = dict.fromkeys(DECIDERS, 0.0)
    for voice in voices:
        said = {name: _of_token(voice, name, token_id) for name in voice.found.logprobs}
        for decider, part in parts(said, voice.weights, voice.blend).items():
            found[decider] += part
    return Explanation(
        text,
        max(DECIDERS, key=found.__getitem__),
        moved_nats(host, steered),
        _likeliest(host, spell),
        _likeliest(steered, spell),
        _neighbours(voices),
    )


def _of_token(voice: Voice, name: str, token_id: int) -> float:
    field, logprobs = voice.found.field, voice.found.logprobs[name]
    ids = torch.full((len(logprobs),), token_id)
    return float(field.of_tokens(logprobs, ids)[voice.row])


def _likeliest(logprobs: Tensor, spell: Callable[[int], str]) -> tuple[tuple[str, float], ...]:
    top = logprobs.topk(min(CANDIDATES, len(logprobs)))
    pairs = zip(top.indices.tolist(), top.values.exp().tolist(), strict=True)
    return tuple((spell(token_id), prob) for token_id, prob in pairs)


def _neighbours(voices: Sequence[Voice]) -> tuple[Neighbour, ...]:
    """The nearest of all memories, each memory counting as its adapter is trusted."""
    trust = [sum(w for name, w in voice.weights.items() if name != "host") for voice in voices]
    total = sum(trust) or 1.0
    found = [
        neighbour
        for voice, share in zip(voices, trust, strict=True)
        for neighbour in _found(voice, share / total)
    ]
    return tuple(sorted(found, key=lambda neighbour: -neighbour.weight)[:NEIGHBOURS])


def _found(voice: Voice, share: float) -> Iterator[Neighbour]:
    answers = voice.found.answers
    answer = answers.get(BESIDE, answers.get("memory"))
    if answer is None or voice.memory is None:
        return
    weights = answer.found.weights[voice.row]
    for place in weights.topk(min(NEIGHBOURS, len(weights))).indices.tolist():
        if weights[place] > 0:
            entry = int(answer.found.entries[voice.row, place])
            yield neighbour(voice.memory, entry, share * float(weights[place]))


def neighbour(memory: Memory, entry: int, weight: float) -> Neighbour:
    """An entry of a memory as its document has it.

    Args:
        memory: The memory.
        entry: Number of the entry.
        weight: Its share of what the memory says.
    """
    position = int(memory.positions[entry])
    place = place_of(sources_of(memory), memory.text, position)
    before = memory.text[max(place.start, position - BEFORE_BYTES) : position]
    after = memory.text[position : position + AFTER_BYTES]
    return Neighbour(place.source, place.line, _text(before), _text(after), weight)


def _text(raw: Tensor) -> str:
    # The zero bytes between documents end one; a character that the cut splits is left out.
    return raw.numpy().tobytes().split(b"\0")[0].decode("utf-8", "ignore")
