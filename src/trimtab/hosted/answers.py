"""What an API answers, whatever dialect it speaks. Pure."""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any

from trimtab.hosted.failures import words_of
from trimtab.hosted.ledger import Usage

_NO_TEXT = re.compile(
    r"<[|｜][^|｜]*[|｜]>|<\|\w+>|<\w+\|>|</?s>|<seed:\w+>"
    r"|<(?:bos|eos|pad|unk|start_of_turn|end_of_turn)>|\[(?:/?INST|BOS|EOS|PAD|UNK)\]"
)
"""How the common families spell tokens that stand for no text."""

_END = re.compile(
    r"</s>|<eos>|<end_of_turn>|<turn\|>|<seed:eos>|\[EOS\]|<｜end▁of▁sentence｜>"
    r"|<\|(?:endoftext|end_of_text|im_end|eot_id|eom_id|end|return|eot)\|>"
)
"""And those among them that end a text or a turn."""

_ESCAPED = re.compile(rb"\\x([0-9a-fA-F]{2})")
_BROKEN = (KeyError, TypeError, ValueError, AttributeError, IndexError, OverflowError)
"""What taking an answer apart raises where parts are missing or are of another kind."""

_OPENAI_COUNTS = ("prompt_tokens", "completion_tokens")
_ANTHROPIC_COUNTS = ("input_tokens", "output_tokens")
_BYTES = b"bytes:"
_REPLACED = "�"


class BrokenAnswer(ValueError):
    """An answer that is not what the API promises: asking again may help."""


class MissingLogprobsError(BrokenAnswer):
    """An answer without the log-probabilities that were asked for."""


@dataclass(frozen=True)
class Token:
    """A token as an API shows it.

    Attributes:
        text: Its bytes; None for one that stands for no text, such as the end, or whose bytes the
            API does not tell.
        logprob: Natural-log probability.
        name: As the API spells it.
        token_id: The API's own number, where it tells.
        ends: It was seen to end a text, whatever its name.
    """

    text: bytes | None
    logprob: float
    name: str = ""
    token_id: int | None = None
    ends: bool = False

    @property
    def is_readable(self) -> bool:
        """It stands for text that is told, or is known to stand for none."""
        return self.text is not None or self.ends or is_no_text(self.name)


@dataclass(frozen=True)
class Place:
    """What an API shows at one place of a text.

    Attributes:
        chosen: The token that stands there.
        top: The likeliest tokens, those that can be read; without the chosen one where that is
            not among them.
        is_shown: There are likeliest tokens, whether or not they can be read.
    """

    chosen: Token
    top: tuple[Token, ...]
    is_shown: bool = True

    @property
    def shows_chosen(self) -> bool:
        """The token that stands there is among the likeliest."""
        return any(token.name == self.chosen.name for token in self.top)


@dataclass(frozen=True)
class Answer:
    """One continuation.

    Attributes:
        text: Of the continuation.
        places: Its tokens, after those of the prompt where these were asked for; none without
            logprobs.
        ended: The model itself has ended the text, not the bound on its length.
    """

    text: str
    places: tuple[Place, ...]
    ended: bool


@dataclass(frozen=True)
class Answers:
    """What one call gave.

    Attributes:
        choices: The continuations.
    """

    choices: tuple[Answer, ...]


def is_no_text(name: str) -> bool:
    """Whether a token's name is that of one that stands for no text."""
    return _NO_TEXT.fullmatch(name) is not None


def is_end(name: str) -> bool:
    """Whether a token's name is that of one that ends a text."""
    return _END.fullmatch(name) is not None


def read_answers(
    raw: Mapping[str, Any], *, logprobs: bool, top: int | None = None, echo: bool = False
) -> Answers:
    """Read what /completions or /chat/completions answered.

    Args:
        raw: The JSON.
        logprobs: They were asked for, and must be there.
        top: Tokens that were asked for at each place. Completions show the chosen one as well,
            where it is not among these, and then it is no part of the top (default: unknown,
            and places may show none).
        echo: The prompt's tokens come first.

    Raises:
        BrokenAnswer: Parts are missing or are of another kind.
    """
    with _taking_apart(raw):
        choices = tuple(_choice(one, top, logprobs=logprobs) for one in raw.get("choices") or ())
    if not choices:
        raise BrokenAnswer("the answer holds no continuation")
    if logprobs and top and not all(_is_shown(one, echo=echo) for one in choices):
        raise MissingLogprobsError("the answer lacks the logprobs of a token")
    return Answers(choices)


def read_messages(raw: Mapping[str, Any]) -> Answers:
    """Read what Anthropic's /messages answered.

    Raises:
        BrokenAnswer: Parts are missing or are of another kind.
    """
    with _taking_apart(raw):
        parts = [_text(part["text"]) for part in raw["content"] if part["type"] == "text"]
        ended = raw.get("stop_reason") not in ("max_tokens", None)
        return Answers((Answer("".join(parts), (), ended),))


@contextmanager
def _taking_apart(raw: Mapping[str, Any]) -> Iterator[None]:
    """Say in words why an answer cannot be taken apart.

    Raises:
        BrokenAnswer: It cannot.
    """
    # Some services answer so, with status 200, where another service behind them has failed.
    if raw.get("error") and not (raw.get("choices") or raw.get("content")):
        raise BrokenAnswer(f"an error in place of an answer: {words_of(raw)}")
    try:
        yield
    except BrokenAnswer:
        raise
    except KeyError as error:
        raise BrokenAnswer(f"the answer lacks {error}") from error
    except _BROKEN as error:
        raise BrokenAnswer(f"the answer cannot be taken apart: {error}") from error


def usage_of(raw: Mapping[str, Any]) -> Usage | None:
    """What an answer says that it took, whatever else it lacks."""
    for counts in (_OPENAI_COUNTS, _ANTHROPIC_COUNTS):
        with suppress(*_BROKEN):
            if (usage := _usage(raw.get("usage"), *counts)) is not None:
                return usage
    return None


def _choice(raw: Mapping[str, Any], top: int | None, *, logprobs: bool) -> Answer:
    text = raw["message"]["content"] if "message" in raw else raw["text"]
    # A chat that ends at once has no content.
    text = "" if text is None else _text(text)
    places = _places(raw.get("logprobs"), top) if logprobs else ()
    if logprobs and text and not places:
        raise MissingLogprobsError("the answer lacks its logprobs")
    reason = raw.get("finish_reason")
    ended = reason not in ("length", None)
    if ended and places and not places[-1].chosen.is_readable:
        # llama.cpp shows the end of a text as a token without a name.
        places = places[:-1]
    elif reason == "stop" and places and _is_beyond(places[-1].chosen, text):
        places = _ending(places, places[-1].chosen.name)
    return Answer(text, places, ended)


def _is_beyond(last: Token, text: str) -> bool:
    """Whether a token stands for no text, or is by its name no part of the answer's text."""
    if last.text is None:
        return True
    # Some servers strip white space from a text; parts of characters are not in it as such.
    name = last.name.strip()
    return last.text == last.name.encode() and bool(name) and name not in text


def _ending(places: Sequence[Place], name: str) -> tuple[Place, ...]:
    """The same places, with tokens of a name as such that end a text."""

    def told(token: Token) -> Token:
        return replace(token, text=None, ends=True) if token.name == name else token

    return tuple(
        replace(place, chosen=told(place.chosen), top=tuple(map(told, place.top)))
        for place in places
    )


def _text(value: object) -> str:
    """A text that can be said and kept.

    Raises:
        BrokenAnswer: It is no string, or holds halves of characters.
    """
    if not isinstance(value, str):
        raise BrokenAnswer(f"the answer's text is of the kind {type(value).__name__}, not a string")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise BrokenAnswer("the answer's text holds half of a character") from None
    return value


def _is_shown(answer: Answer, *, echo: bool) -> bool:
    """Whether log-probabilities are shown at each place that the model has written."""
    if not echo:
        return all(place.is_shown for place in answer.places)
    # Of a prompt, nothing is shown at the first place, and the last one may be the prompt's.
    return answer.ended or all(place.is_shown for place in answer.places[1:][-1:])


def _places(raw: Mapping[str, Any] | None, most: int | None) -> tuple[Place, ...]:
    if not raw:
        return ()
    if "content" in raw:
        return tuple(
            _place(_token(one), [*map(_token, one["top_logprobs"] or ())], most)
            for one in raw["content"] or ()
        )
    columns = zip(raw["tokens"], raw["token_logprobs"], raw["top_logprobs"], strict=True)
    return tuple(
        # The first token of a text has nothing before it that could say how likely it is.
        _place(
            _named(name, 0.0 if logprob is None else logprob),
            [_named(*pair) for pair in (top or {}).items()],
            most,
        )
        for name, logprob, top in columns
    )


def _place(chosen: Token, shown: Sequence[Token], most: int | None) -> Place:
    is_shown = bool(shown)
    if most is not None and len(shown) > most:
        least = min(shown, key=lambda token: token.logprob)
        shown = [token for token in shown if token is not least or token.name != chosen.name]
    return Place(chosen, tuple(token for token in shown if token.is_readable), is_shown)


def _token(raw: Mapping[str, Any]) -> Token:
    name, given = raw["token"], raw.get("bytes")
    token = _named(name, float(raw["logprob"]), raw.get("id"))
    if given is None or is_no_text(name):
        return token
    # A number alone would be taken for a size.
    return Token(bytes(list(given)) or None, token.logprob, name, token.token_id)


def _named(name: str, logprob: float, token_id: int | None = None) -> Token:
    if not math.isfinite(logprob):
        raise BrokenAnswer(f"the answer's logprob of {name!r} is not finite")
    return Token(bytes_of(name), float(logprob), name, token_id)


def bytes_of(name: str) -> bytes | None:
    """The bytes of a token by its name; None where it stands for none, or they are not told."""
    if is_no_text(name) or _REPLACED in name:
        return None
    text = name.encode()
    if text.startswith(_BYTES) and _ESCAPED.search(text):
        # Bytes that are no text by themselves, as OpenAI's completions spell them.
        return _ESCAPED.sub(lambda escaped: bytes([int(escaped[1], 16)]), text.removeprefix(_BYTES))
    return text or None


def _usage(raw: Mapping[str, Any] | None, prompt: str, completion: str) -> Usage | None:
    if not raw or prompt not in raw:
        return None
    usage = Usage(int(raw[prompt]), int(raw.get(completion) or 0))
    if min(usage.prompt_tokens, usage.completion_tokens) < 0:
        raise ValueError("counts of tokens that are not negative")
    return usage


def text_of(places: Sequence[Place]) -> bytes:
    """The text that tokens stand for."""
    return b"".join(place.chosen.text or b"" for place in places)
