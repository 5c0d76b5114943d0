"""What the clients ask, and what an answer is, however it comes."""

import json
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bench.compatibility.adapter import WORDS

LOGPROBS_NATS = 1e-3
"""Log-probabilities that are told may differ by the rounding of a larger matrix product."""

_LIGHT = {"carriers": ["head", "memory"]}
SWAPPED = "host+swap"
"""The model whose adapter is exchanged while requests run."""


@dataclass(frozen=True)
class Ask:
    """A request, greedy.

    Attributes:
        route: Below /v1/.
        body: Without `stream`.
    """

    route: str
    body: Mapping[str, Any]

    @property
    def is_chat(self) -> bool:
        """Whether it is a chat."""
        return self.route == "chat/completions"

    @property
    def is_swapped(self) -> bool:
        """Whether its answer depends on when it comes."""
        return self.body["model"] == SWAPPED


@dataclass(frozen=True)
class Answer:
    """What a request was answered.

    Attributes:
        texts: Of each choice.
        finishes: Why each has ended.
        completion_tokens: Of all.
        logprobs: Of the tokens that were told, in nats.
    """

    texts: tuple[str, ...]
    finishes: tuple[str, ...]
    completion_tokens: int
    logprobs: tuple[float, ...]

    def equals(self, other: "Answer") -> bool:
        """Whether both say the same, log-probabilities up to rounding."""
        pairs = list(zip(self.logprobs, other.logprobs, strict=False))
        return (
            (self.texts, self.finishes, self.completion_tokens)
            == (other.texts, other.finishes, other.completion_tokens)
            and len(self.logprobs) == len(other.logprobs)
            and all(abs(one - two) <= LOGPROBS_NATS for one, two in pairs)
        )


def asks(count: int, seed: int = 0) -> list[Ask]:
    """Requests of all kinds: long and short, chats, several answers, several adapters."""
    chosen = random.Random(seed)
    return [_ask(number, chosen) for number in range(count)]


def _ask(number: int, chosen: random.Random) -> Ask:
    words = chosen.choice((2, 5, 12, 60))
    text = " ".join(["The", *(chosen.choice(WORDS) for _ in range(words))])
    body: dict[str, Any] = {"temperature": 0, "max_tokens": chosen.choice((4, 12, 24))}
    models = ("host", "host+sea", SWAPPED, "host+ship", "host+sea:0.7+ship:0.3", "host+sea:0.5")
    body["model"] = model = models[number % len(models)]
    # One in nine runs the small model beside the host too.
    if model != "host" and number % 9:
        body["trimtab"] = _LIGHT
    kind = number // len(models) % 6
    if kind == 1:
        return Ask("chat/completions", {**body, "messages": [{"role": "user", "content": text}]})
    extra: Mapping[str, Any] = (
        {},
        {},
        {"n": 2, "logprobs": 2},
        {"echo": True, "logprobs": 0},
        {"logit_bias": {"257": -100}, "stop": ["qq", "\n\n\n"]},
        {"prompt": [text, text[:9]]},
    )[kind]
    return Ask("completions", {**body, "prompt": text, **extra})


def whole_answer(content: Mapping[str, Any], *, chat: bool) -> Answer:
    """An answer that came in one piece."""
    choices = sorted(content["choices"], key=lambda choice: choice["index"])
    texts = [choice["message"]["content"] if chat else choice["text"] for choice in choices]
    nats = [nat for choice in choices for nat in _nats(choice)]
    finishes = tuple(choice["finish_reason"] for choice in choices)
    return Answer(tuple(texts), finishes, content["usage"]["completion_tokens"], tuple(nats))


def streamed_answer(chunks: Iterable[Mapping[str, Any]], *, chat: bool) -> Answer:
    """The same answer, put together from a stream whose last chunk has the usage."""
    texts: dict[int, str] = {}
    finishes: dict[int, str] = {}
    nats: dict[int, list[float]] = {}
    tokens = -1
    for chunk in chunks:
        for choice in chunk["choices"]:
            index = choice["index"]
            said = choice["delta"].get("content") if chat else choice["text"]
            texts[index] = texts.get(index, "") + (said or "")
            finishes[index] = choice["finish_reason"] or finishes.get(index, "")
            nats.setdefault(index, []).extend(_nats(choice))
        if chunk.get("usage"):
            tokens = chunk["usage"]["completion_tokens"]
    order = sorted(texts)
    every = tuple(nat for index in order for nat in nats[index])
    return Answer(tuple(texts[i] for i in order), tuple(finishes[i] for i in order), tokens, every)


def _nats(choice: Mapping[str, Any]) -> list[float]:
    told = choice.get("logprobs") or {}
    return [nat for nat in told.get("token_logprobs") or [] if nat is not None]


def closest_nats(content: Mapping[str, Any], *, chat: bool) -> float:
    """How near the two likeliest tokens come anywhere in an answer, which was asked with top two.

    Greedy answers are the same in all company only up to such ties.
    """
    gaps = [float("inf")]
    for choice in content["choices"]:
        told = choice["logprobs"]
        tops: Sequence[Any] = told["content"] if chat else told["top_logprobs"]
        for top in tops:
            values = [t["logprob"] for t in top["top_logprobs"]] if chat else list(top.values())
            best = sorted(values, reverse=True)[:2]
            gaps.append(best[0] - best[1] if len(best) == 2 else float("inf"))
    return min(gaps)


def error_problem(status: int, body: bytes) -> str | None:
    """What is wrong with how an error is told; None where it is OpenAI's JSON."""
    try:
        content = json.loads(body)
        error = content["error"]
        is_told = set(error) == {"message", "type", "param", "code"} and bool(error["message"])
    except (ValueError, TypeError, KeyError):
        is_told = False
    if not is_told:
        return f"{status} is no JSON error: {body[:200]!r}"
    return None
