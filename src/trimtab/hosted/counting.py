"""How many tokens a host reads, as far as its API's own counts tell. Pure."""

from collections.abc import Mapping
from typing import Any, final

from trimtab.hosted.answers import Answers
from trimtab.hosted.ledger import Usage
from trimtab.hosted.tokens import KnownTokens

BYTES_A_TOKEN = 3.0
"""Fewer than most texts have, where a host's tokenizer is not known: an estimate is to be high."""

TEMPLATE_TOKENS = 40
"""More than most chat templates put around a message."""

SPECIAL_TOKENS = 2
"""Most that a server puts around a text, or counts without them."""

_OTHER_SHARE, _FEWEST_OTHERS = 0.1, 3
"""A tokenizer is doubted from there on: servers spell a few tokens in their own way."""


@final
class Counts:
    """What an API has counted in this run."""

    def __init__(self) -> None:
        """Begin with nothing counted."""
        self.bytes_a_token = BYTES_A_TOKEN
        self._told: dict[bool, tuple[str, int]] = {}

    def learn(self, body: Mapping[str, Any], usage: Usage | None) -> None:
        """Keep what the API says that a request has made it read.

        Args:
            body: The request; one of token ids tells nothing.
            usage: What the answer took; None where the API has not said.
        """
        is_chat, text = "messages" in body, _read_text(body)
        if usage is None or not text or not usage.prompt_tokens:
            return
        self._told[is_chat] = (text, usage.prompt_tokens)
        if not is_chat:
            each = max(1.0, len(text.encode()) / usage.prompt_tokens)
            self.bytes_a_token = min(self.bytes_a_token, each)

    def told(self, *, chat: bool) -> tuple[str, int] | None:
        """The text, or the message and what is begun of its answer, counted last; its tokens."""
        return self._told.get(chat)

    def likely(self, text: str, *, chat: bool) -> int:
        """About how many tokens are read where a text or a message is sent."""
        count = int(len(text.encode()) / self.bytes_a_token) + 1
        if not chat:
            return count + 1
        before = self._told.get(True)
        if before is None:
            return count + TEMPLATE_TOKENS
        around = before[1] - int(len(before[0].encode()) / self.bytes_a_token)
        return count + max(0, around)

    def most(self, text: str, *, chat: bool) -> int:
        """Most tokens that are read: one a byte, but for what the API has counted already.

        Around a message stands a template; one of more than `TEMPLATE_TOKENS` is seen only once
        the API has counted a message.
        """
        size, before = len(text.encode()), self._told.get(chat)
        most = size + (TEMPLATE_TOKENS if chat else SPECIAL_TOKENS)
        if before is None:
            return most
        shared = len(text[: _alike(text, before[0])].encode())
        counted = before[1] + size - shared
        return counted if chat else min(most, counted)


def misfit(
    tokens: KnownTokens, told: tuple[str, int] | None, answers: Answers, *, chat: bool
) -> str:
    """Why a tokenizer seems to be another model's, in words; empty where nothing speaks for that.

    Args:
        tokens: The tokenizer.
        told: A text that the API has read, and how many tokens it counts there.
        answers: Tokens that the API shows.
        chat: The text is a message, around which a template stands: counts cannot be compared.
    """
    if told is not None and not chat:
        text, counted = told
        ours = len(tokens.encode(text))
        if not -SPECIAL_TOKENS - ours // 20 <= counted - ours <= SPECIAL_TOKENS + ours // 20:
            return f"it has {ours} tokens for {_begin(text)!r}, and the API counts {counted}"
    places = (place for choice in answers.choices for place in choice.places)
    shown = {token.name: token for place in places for token in place.top if token.text}
    others = [name for name, token in shown.items() if tokens.id_of(token) is None]
    if len(others) >= max(_FEWEST_OTHERS, _OTHER_SHARE * len(shown)):
        return (
            f"it lacks {len(others)} of {len(shown)} tokens that the API shows, such as"
            f" {others[0]!r}"
        )
    return ""


def _read_text(body: Mapping[str, Any]) -> str:
    if "messages" in body:
        return "".join(str(message["content"]) for message in body["messages"])
    prompt = body.get("prompt")
    return prompt if isinstance(prompt, str) else ""


def _alike(one: str, other: str) -> int:
    """Characters that two texts begin with."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((n for n, (a, b) in pairs if a != b), min(len(one), len(other)))


def _begin(text: str) -> str:
    return text if len(text) <= 40 else f"{text[:40]}…"
