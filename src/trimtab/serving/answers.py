"""Answers as OpenAI's clients read them. Pure."""

import codecs
import secrets
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, final

from trimtab.backends.hf import HFModel
from trimtab.serving.work import Done, Finish, Likely, Piece
from trimtab.steering.explain import Explanation

LEAST_LOGPROB = -9999.0
"""Stands for the impossible, as in OpenAI's answers: JSON has no infinity."""


@dataclass
class Answer:
    """One answer, as far as it has come.

    Attributes:
        text: Its text.
        tokens: Its tokens, where log-probabilities are asked for.
        finish: Why it has ended.
        trace: Explanations of its tokens, where they are asked for.
    """

    text: list[str] = field(default_factory=list)
    tokens: list[Likely] = field(default_factory=list)
    finish: Finish | None = None
    trace: list[Explanation] = field(default_factory=list)


@final
class Writer:
    """Writes a request's answers, in one piece or in chunks."""

    def __init__(self, host: HFModel, model: str, *, chat: bool, has_logprobs: bool) -> None:
        """Begin an answer of its own id.

        Args:
            host: Its vocabulary names tokens.
            model: As the request has it.
            chat: Whether it is a chat.
            has_logprobs: Whether log-probabilities were asked for.
        """
        self._host = host
        self._chat = chat
        self._has_logprobs = has_logprobs
        kind = "chat.completion" if chat else "text_completion"
        self._head = {
            "id": f"{'chatcmpl' if chat else 'cmpl'}-{secrets.token_hex(12)}",
            "object": kind,
            "created": int(time.time()),
            "model": model,
        }
        self._offsets: dict[int, tuple[int, codecs.IncrementalDecoder]] = {}
        self._opened: set[int] = set()

    def whole(self, answers: Sequence[Answer], done: Done) -> dict[str, Any]:
        """The answers in one piece."""
        choices = []
        for index, answer in enumerate(answers):
            text = "".join(answer.text)
            said = (
                {"message": {"role": "assistant", "content": text, "refusal": None}}
                if self._chat
                else {"text": text}
            )
            logprobs = self._logprobs(index, answer.tokens)
            end = {"logprobs": logprobs, "finish_reason": answer.finish}
            choices.append({"index": index, **said, **end, **_traced(answer.trace)})
        return {**self._head, "choices": choices, "usage": usage(done)}

    def chunks(self, piece: Piece, *, usage_follows: bool) -> Iterable[dict[str, Any]]:
        """A piece as chunks of a stream: in a chat the role comes first, and the end by itself."""
        logprobs = self._logprobs(piece.choice, piece.tokens) if piece.tokens else None
        if not self._chat:
            said = {"text": piece.text, "logprobs": logprobs, **_traced(piece.trace)}
            yield self._chunk(piece.choice, said, piece.finish, usage_follows)
            return
        if piece.choice not in self._opened:
            self._opened.add(piece.choice)
            opening = {"delta": {"role": "assistant", "content": ""}, "logprobs": None}
            yield self._chunk(piece.choice, opening, None, usage_follows)
        if piece.text or piece.tokens or piece.trace:
            said = {"delta": {"content": piece.text}, "logprobs": logprobs}
            said |= _traced(piece.trace)
            yield self._chunk(piece.choice, said, None, usage_follows)
        if piece.finish:
            said = {"delta": {}, "logprobs": None}
            yield self._chunk(piece.choice, said, piece.finish, usage_follows)

    def last(self, done: Done) -> dict[str, Any]:
        """The chunk that counts tokens."""
        return {**self._stream_head, "choices": [], "usage": usage(done)}

    @property
    def _stream_head(self) -> dict[str, Any]:
        kind = "chat.completion.chunk" if self._chat else "text_completion"
        return {**self._head, "object": kind}

    def _chunk(
        self, index: int, said: dict[str, Any], finish: Finish | None, usage_follows: bool
    ) -> dict[str, Any]:
        choice = {"index": index, **said, "finish_reason": finish}
        empty = {"usage": None} if usage_follows else {}
        return {**self._stream_head, "choices": [choice], **empty}

    def _logprobs(self, index: int, tokens: Sequence[Likely]) -> dict[str, Any] | None:
        if not self._has_logprobs:
            return None
        if self._chat:
            return {"content": [self._in_chat(token) for token in tokens], "refusal": None}
        names = [self._named(token.token_id) for token in tokens]
        offset, decoder = self._offsets.get(index) or (0, _decoder())
        offsets = []
        for token in tokens:
            offsets.append(offset)
            # A character that several tokens share counts where it is complete.
            offset += len(decoder.decode(self._bytes(token.token_id)))
        self._offsets[index] = offset, decoder
        return {
            "tokens": names,
            "token_logprobs": [_finite(token.logprob) for token in tokens],
            "top_logprobs": [
                None
                if token.logprob is None
                else {self._named(i): _finite(logprob) for i, logprob in _with_own(token)}
                for token in tokens
            ],
            "text_offset": offsets,
        }

    def _in_chat(self, token: Likely) -> dict[str, Any]:
        top = [self._one(i, logprob) for i, logprob in token.top]
        return {**self._one(token.token_id, token.logprob), "top_logprobs": top}

    def _one(self, token_id: int, logprob: float | None) -> dict[str, Any]:
        text = self._bytes(token_id)
        shown = text.decode("utf-8", "replace") if text else self._named(token_id)
        return {"token": shown, "logprob": _finite(logprob), "bytes": list(text) or None}

    def _bytes(self, token_id: int) -> bytes:
        return self._host.vocabulary.token_bytes[token_id] or b""

    def _named(self, token_id: int) -> str:
        """A name of a token of its own: its text, or its bytes where these are no text."""
        text = self._bytes(token_id)
        if not text:
            return str(self._host.tokenizer.convert_ids_to_tokens(token_id))
        try:
            return text.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in text)


def _decoder() -> codecs.IncrementalDecoder:
    return codecs.getincrementaldecoder("utf-8")("replace")


def _with_own(token: Likely) -> list[tuple[int, float | None]]:
    """The likeliest tokens, and the one that stands there if it is none of them."""
    found: list[tuple[int, float | None]] = list(token.top)
    if token.top and all(i != token.token_id for i, _ in token.top):
        found.append((token.token_id, token.logprob))
    return found


def _traced(trace: Sequence[Explanation]) -> dict[str, Any]:
    """A field of ours, which OpenAI's clients pass over."""
    return {"trimtab": {"trace": [one.as_json() for one in trace]}} if trace else {}


def _finite(logprob: float | None) -> float | None:
    return None if logprob is None else max(logprob, LEAST_LOGPROB)


def usage(done: Done) -> dict[str, int]:
    """Tokens that were read and written."""
    return {
        "prompt_tokens": done.prompt_tokens,
        "completion_tokens": done.completion_tokens,
        "total_tokens": done.prompt_tokens + done.completion_tokens,
    }
