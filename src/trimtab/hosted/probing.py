"""Asking an API what it can do; nothing is assumed from its name."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, final

from trimtab.align.strings import is_whole
from trimtab.errors import InputError, ModelError
from trimtab.hosted.answers import Answers, Place, read_answers, read_messages, text_of
from trimtab.hosted.capabilities import (
    Capabilities,
    kept_path,
    read_capabilities,
    write_capabilities,
)
from trimtab.hosted.client import Client
from trimtab.hosted.ledger import Usage
from trimtab.hosted.requests import CHAT, COMPLETIONS, MESSAGES, Prefix, Wanted, chat, completion
from trimtab.hosted.requests import messages as message_request
from trimtab.hosted.tokens import KnownTokens

TOPS = (20, 5, 1)
"""Numbers of likeliest tokens that services allow."""

SAME_NATS = 0.05
"""Two readings of one text differ by less, whatever the service's arithmetic."""

LOOK_TOKENS = {"openai": 700, "anthropic": 60}
"""By dialect, more than all questions and answers of a look are likely to have."""

_TEXT = "The rudder turns the ship, and the ship"
_MESSAGE = "Tell me about ships."
_AHEAD = 4


def capabilities_of(
    client: Client, tokens: KnownTokens | None, *, top: int, named: str, again: bool = False
) -> Capabilities:
    """What an API can do: as found before, or else by asking it, with a dozen short requests.

    Args:
        client: Calls it.
        tokens: Its tokenizer, if that is known.
        top: Log-probabilities to ask for at each place.
        named: How the tokenizer was named.
        again: Ask, whatever was found before.

    Raises:
        ModelError: It answers neither texts nor messages.
        InputError: The budget of tokens may be too small for a look.
    """
    path = kept_path(client.address, f"{top} {named}")
    found = None if again else read_capabilities(path)
    if found is None:
        most = LOOK_TOKENS[client.address.dialect]
        if not client.ledger.allows(Usage(most)):
            raise InputError(
                f"{client.address.url} has not been looked at yet; that takes up to {most} tokens,"
                " which --api-budget-tokens does not allow",
                hint="give a larger budget, or look once without one: `trimtab hosts probe`",
            )
        found = _Prober(client, tokens, top).probe()
        write_capabilities(path, found)
    return found


@final
class _Prober:
    """One round of questions."""

    def __init__(self, client: Client, tokens: KnownTokens | None, top: int) -> None:
        self._client = client
        self._model = client.address.model
        self._tokens = tokens
        self._tops = sorted({top, *(t for t in TOPS if t < top)}, reverse=True)
        self._refusals: list[str] = []

    def probe(self) -> Capabilities:
        """Ask everything."""
        if self._client.address.dialect == "anthropic":
            body = message_request(self._model, Prefix("", _MESSAGE), Wanted(1))
            if self._try(MESSAGES, body, read_messages) is None:
                raise self._nothing()
            return Capabilities(dialect="anthropic", chat=True)
        found = self._with_chat(self._with_completions(Capabilities(dialect="openai")))
        if not found.completions and not found.chat:
            raise self._nothing()
        return found

    def _with_completions(self, found: Capabilities) -> Capabilities:
        prefix = Prefix(_TEXT)
        top, places = self._highest(
            COMPLETIONS, lambda top: completion(self._model, prefix, Wanted(1, top))
        )
        plain = top or self._complete(prefix, Wanted(1)) is not None
        if not plain:
            return found
        several = self._complete(prefix, Wanted(1, count=2, temperature=1.0))
        bias = self._bias(COMPLETIONS, completion(self._model, prefix, Wanted(1, top)), places)
        return found.model_copy(
            update={
                "completions": True,
                "top_completions": top,
                "echo": bool(top) and self._echoes(prefix, top),
                "token_prompts": self._takes_tokens(top, places),
                "several": several is not None and len(several.choices) == 2,
                "logit_bias": bias,
            }
        )

    def _with_chat(self, found: Capabilities) -> Capabilities:
        prefix = Prefix("", _MESSAGE)
        for name in ("max_tokens", "max_completion_tokens"):
            by = found.model_copy(update={"length_name": name})
            if self._try(CHAT, chat(self._model, prefix, Wanted(1), by), _plain) is not None:
                break
        else:
            return found
        top, places = self._highest(
            CHAT, lambda top: chat(self._model, prefix, Wanted(_AHEAD, top), by)
        )
        by = by.model_copy(update={"chat": True, "top_chat": top})
        update: dict[str, Any] = {"prefill": self._prefill(by, top, places)}
        if by.several or not by.completions:
            # What is used in both ways must be understood in both.
            wanted = Wanted(1, count=2, temperature=1.0)
            several = self._try(CHAT, chat(self._model, prefix, wanted, by), _plain)
            update["several"] = several is not None and len(several.choices) == 2
        if not by.completions:
            body = chat(self._model, prefix, Wanted(1, top), by)
            update["logit_bias"] = self._bias(CHAT, body, places)
        return by.model_copy(update=update)

    def _highest(
        self, path: str, body: Callable[[int], Mapping[str, Any]]
    ) -> tuple[int, tuple[Place, ...]]:
        """The most log-probabilities that are shown, and the answer with them."""
        for top in self._tops:
            found = self._try(path, body(top), _with_logprobs)
            if found and found.choices[0].places:
                places = found.choices[0].places
                shown = max(len(place.top) for place in places)
                if shown:
                    return min(top, shown), places
        return 0, ()

    def _echoes(self, prefix: Prefix, top: int) -> bool:
        found = self._complete(prefix, Wanted(1, top, echo=True))
        if found is None:
            return False
        places = found.choices[0].places
        shows = len(places) > 2 and all(place.top for place in places[1:])
        return shows and text_of(places).startswith(prefix.text.encode())

    def _takes_tokens(self, top: int, places: Sequence[Place]) -> bool:
        """Whether ids of the given tokenizer mean to the API what their text means."""
        if self._tokens is None or not top or not places:
            return False
        ids = [*self._tokens.context_ids(), *self._tokens.encode(_TEXT)]
        found = self._complete(Prefix("", None, ids), Wanted(1, top))
        return found is not None and _same(found.choices[0].places[:1], places[:1])

    def _prefill(self, by: Capabilities, top: int, places: Sequence[Place]) -> str:
        """Whether an answer goes on from its own beginning as it went on by itself."""
        # As short as can be: the more tokens, the more ways to cut their text again.
        texts = [text_of(places[:size]) for size in range(len(places))]
        sizes = (n for n, text in enumerate(texts) if text.strip() and is_whole(text))
        size = next(sizes, 0)
        if not top or not size:
            return "none"
        begun = text_of(places[:size]).decode()
        for kind in ("plain", "flagged"):
            trial = by.model_copy(update={"prefill": kind})
            body = chat(self._model, Prefix(begun, _MESSAGE), Wanted(1, top), trial)
            found = self._try(CHAT, body, _with_logprobs)
            if found and _same(found.choices[0].places[:1], places[size : size + 1]):
                return kind
        return "none"

    def _bias(self, path: str, body: Mapping[str, Any], places: Sequence[Place]) -> str:
        likeliest = places[0].chosen if places else None
        token_id = likeliest.token_id if likeliest else None
        if likeliest and token_id is None and self._tokens:
            token_id = self._tokens.id_of(likeliest)
        biased = {**body, "logit_bias": {str(0 if token_id is None else token_id): -100}}
        found = self._try(path, biased, _with_logprobs if "logprobs" in body else _plain)
        if found is None:
            return "none"
        after = found.choices[0].places
        if token_id is None or likeliest is None or not after:
            return "accepted"
        return "works" if after[0].chosen.name != likeliest.name else "accepted"

    def _complete(self, prefix: Prefix, wanted: Wanted) -> Answers | None:
        read = _with_logprobs if wanted.top else _plain
        return self._try(COMPLETIONS, completion(self._model, prefix, wanted), read)

    def _try(
        self, path: str, body: Mapping[str, Any], read: Callable[[Mapping[str, Any]], Answers]
    ) -> Answers | None:
        found = self._client.try_once(path, body, read)
        if isinstance(found, str):
            self._refusals.append(found)
            return None
        return found

    def _nothing(self) -> ModelError:
        said = self._refusals[-1] if self._refusals else "nothing"
        return ModelError(
            f"{self._client.address.url} answers neither texts nor messages: {said}",
            hint=f"check the address, and that it serves a model {self._model}",
        )


def _with_logprobs(raw: Mapping[str, Any]) -> Answers:
    return read_answers(raw, logprobs=True)


def _plain(raw: Mapping[str, Any]) -> Answers:
    return read_answers(raw, logprobs=False)


def _same(ours: Sequence[Place], theirs: Sequence[Place]) -> bool:
    """Whether the API says the same of the next token, as far as both answers show it."""
    if not ours or not theirs:
        return False
    one, other = ({t.name: t.logprob for t in place.top} for place in (ours[0], theirs[0]))
    shared = one.keys() & other.keys()
    enough = 2 * len(shared) >= max(len(one), len(other), 1)
    return enough and all(abs(one[name] - other[name]) < SAME_NATS for name in shared)
