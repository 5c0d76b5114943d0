"""Asking an API what it can do; nothing is assumed from its name."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, final

from trimtab.align.strings import is_whole
from trimtab.errors import InputError, ModelError
from trimtab.hosted.address import of_the_address
from trimtab.hosted.answers import Answers, Place, text_of
from trimtab.hosted.asking import asked_otherwise, named_otherwise
from trimtab.hosted.capabilities import (
    Capabilities,
    kept_path,
    read_capabilities,
    write_capabilities,
)
from trimtab.hosted.client import Client
from trimtab.hosted.failures import FailedError, RefusedError
from trimtab.hosted.host import HostedModel
from trimtab.hosted.ledger import Usage, counted
from trimtab.hosted.requests import Prefix, Wanted, path_and_body
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
        self._plain: Callable[[], Answers | str] | None = None
        self._failure: FailedError | None = None

    def probe(self) -> Capabilities:
        """Ask everything."""
        if self._client.address.dialect == "anthropic":
            by = Capabilities(dialect="anthropic", chat=True)
            found = self._understood(by, Prefix("", _MESSAGE))
            if found is None:
                raise self._nothing()
            return found
        found = self._with_chat(self._with_completions(Capabilities(dialect="openai")))
        if not found.completions and not found.chat:
            raise self._failure or self._nothing()
        return found

    def _understood(self, by: Capabilities, prefix: Prefix) -> Capabilities | None:
        """How a plain question must be asked to be answered; None where it is not."""
        way: Capabilities | None = by
        while way is not None:
            question = self._question(way, prefix, Wanted(1))
            found = self._answered(question)
            if isinstance(found, Answers):
                self._plain = question
                return way
            other = asked_otherwise(way, found)
            way = named_otherwise(way) if other is None and prefix.message is not None else other
        return None

    def _with_completions(self, found: Capabilities) -> Capabilities:
        prefix = Prefix(_TEXT)
        try:
            by = self._understood(found, prefix)
        except FailedError as error:
            if not _is_there(error):
                raise
            # It may have a chat all the same.
            self._failure, by = error, None
        if by is None:
            return found
        top, places = self._highest(by, prefix, 1)
        several = self._ask(by, prefix, Wanted(1, count=2, temperature=1.0))
        return by.model_copy(
            update={
                "completions": True,
                "top_completions": top,
                "echo": bool(top) and self._echoes(by, prefix, top),
                "token_prompts": self._takes_tokens(by, top, places),
                "several": several is not None and len(several.choices) == 2,
                "logit_bias": self._bias(by, prefix, top, places),
            }
        )

    def _with_chat(self, found: Capabilities) -> Capabilities:
        prefix = Prefix("", _MESSAGE)
        by = self._understood(found, prefix)
        if by is None:
            return found
        top, places = self._highest(by, prefix, _AHEAD)
        by = by.model_copy(update={"chat": True, "top_chat": top})
        update: dict[str, Any] = {"prefill": self._prefill(by, top, places)}
        update["echo"] = by.echo and _tells_prompt(by)
        if by.several or not by.completions:
            # What is used in both ways must be understood in both.
            several = self._ask(by, prefix, Wanted(1, count=2, temperature=1.0))
            update["several"] = several is not None and len(several.choices) == 2
        if not by.completions:
            update["logit_bias"] = self._bias(by, prefix, top, places)
        return by.model_copy(update=update)

    def _highest(
        self, by: Capabilities, prefix: Prefix, ahead: int
    ) -> tuple[int, tuple[Place, ...]]:
        """The most log-probabilities that are shown, and the answer with them."""
        for top in self._tops:
            found = self._ask(by, prefix, Wanted(ahead, top))
            if found and found.choices[0].places:
                places = found.choices[0].places
                shown = max(len(place.top) for place in places)
                if shown:
                    return min(top, shown), places
        return 0, ()

    def _echoes(self, by: Capabilities, prefix: Prefix, top: int) -> bool:
        if not _tells_prompt(by):
            return False
        found = self._ask(by, prefix, Wanted(1, top, echo=True))
        if found is None:
            return False
        places = found.choices[0].places
        shows = len(places) > 2 and all(place.top for place in places[1:])
        return shows and text_of(places).startswith(prefix.text.encode())

    def _takes_tokens(self, by: Capabilities, top: int, places: Sequence[Place]) -> bool:
        """Whether ids of the given tokenizer mean to the API what their text means."""
        if self._tokens is None or not top or not places:
            return False
        ids = [*self._tokens.context_ids(), *self._tokens.encode(_TEXT)]
        found = self._ask(by, Prefix("", None, ids), Wanted(1, top))
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
            found = self._ask(trial, Prefix(begun, _MESSAGE), Wanted(1, top))
            if found and _same(found.choices[0].places[:1], places[size : size + 1]):
                return kind
        return "none"

    def _bias(self, by: Capabilities, prefix: Prefix, top: int, places: Sequence[Place]) -> str:
        likeliest = places[0].chosen if places else None
        token_id = likeliest.token_id if likeliest else None
        if likeliest and token_id is None and self._tokens:
            token_id = self._tokens.id_of(likeliest)
        bias = {"logit_bias": {str(0 if token_id is None else token_id): -100}}
        found = self._ask(by, prefix, Wanted(1, top), bias)
        if found is None:
            return "none"
        after = found.choices[0].places
        # What is drawn differs from the likeliest in any case.
        if token_id is None or likeliest is None or not after or not by.takes_temperature:
            return "accepted"
        return "works" if after[0].chosen.name != likeliest.name else "accepted"

    def _ask(
        self,
        by: Capabilities,
        prefix: Prefix,
        wanted: Wanted,
        more: Mapping[str, Any] | None = None,
    ) -> Answers | None:
        """The answer to a question that need not be understood; None where it is not.

        Raises:
            ModelError: The API fails, or refuses, whatever it is asked.
        """
        found = self._answered(self._question(by, prefix, wanted, more))
        return found if isinstance(found, Answers) else None

    def _answered(self, question: Callable[[], Answers | str]) -> Answers | str:
        """The answer to a question, or what came instead."""
        try:
            found = question()
        except (RefusedError, FailedError) as error:
            if not self._is_of_the_question(error):
                raise
            found = error.message
        if isinstance(found, str):
            self._refusals.append(found)
        return found

    def _is_of_the_question(self, error: RefusedError | FailedError) -> bool:
        """Whether the API fails at one question alone: the plain one is still answered."""
        if self._plain is None:
            return False
        if isinstance(error, RefusedError):
            return error.status == 403
        return _is_there(error) and isinstance(self._plain(), Answers)

    def _question(
        self,
        by: Capabilities,
        prefix: Prefix,
        wanted: Wanted,
        more: Mapping[str, Any] | None = None,
    ) -> Callable[[], Answers | str]:
        """What asks once, within the budget."""
        host = HostedModel(self._client, by, self._tokens)
        path, body = path_and_body(self._model, prefix, wanted, by)
        estimate = host.estimate(prefix, wanted)

        def asked() -> Answers | str:
            # The bound that was checked before is of short answers and the usual tokens.
            if not self._client.ledger.allows(estimate):
                raise InputError(
                    f"looking at {self._client.address.url}, with answers of"
                    f" {counted(by.shortest_tokens, 'token')}, may take more than"
                    " --api-budget-tokens allows",
                    hint="give a larger budget, or look once without one: `trimtab hosts probe`",
                )
            read = host.reader(wanted, is_look=True)
            return self._client.try_once(path, {**body, **(more or {})}, read, estimate=estimate)

        return asked

    def _nothing(self) -> ModelError:
        said = self._refusals[-1] if self._refusals else "nothing"
        return ModelError(
            f"{self._client.address.url} answers neither texts nor messages: {said}",
            hint=of_the_address(self._client.address),
        )


def _is_there(error: FailedError) -> bool:
    """Whether a server has answered, though with a failure of its own."""
    return (error.status or 0) >= 500


def _tells_prompt(by: Capabilities) -> bool:
    """Whether an echo tells which tokens are the prompt's: all but the one that is written."""
    return by.shortest_tokens == 1


def _same(ours: Sequence[Place], theirs: Sequence[Place]) -> bool:
    """Whether the API says the same of the next token, as far as both answers show it."""
    if not ours or not theirs:
        return False
    one, other = ({t.name: t.logprob for t in place.top} for place in (ours[0], theirs[0]))
    shared = one.keys() & other.keys()
    enough = 2 * len(shared) >= max(len(one), len(other), 1)
    return enough and all(abs(one[name] - other[name]) < SAME_NATS for name in shared)
