"""A model behind an API, as far as it can be seen."""

from dataclasses import dataclass
from typing import final

from trimtab.errors import ModelError
from trimtab.hosted.answers import Answers, read_answers, read_messages
from trimtab.hosted.capabilities import Capabilities
from trimtab.hosted.client import Client, Reader
from trimtab.hosted.counting import BYTES_A_TOKEN, SPECIAL_TOKENS, TEMPLATE_TOKENS, misfit
from trimtab.hosted.ledger import Usage
from trimtab.hosted.requests import Prefix, Wanted, length, path_and_body
from trimtab.hosted.tokens import KnownTokens


@final
@dataclass(frozen=True, eq=False)
class HostedModel:
    """A model behind an API.

    Attributes:
        client: Calls it.
        by: What it can do.
        tokens: Its tokenizer, if that is known.
    """

    client: Client
    by: Capabilities
    tokens: KnownTokens | None = None

    def go_on(self, prefix: Prefix, wanted: Wanted, *, ordinal: int = 0) -> Answers:
        """Let it continue.

        Args:
            prefix: What it goes on from.
            wanted: What is to come back.
            ordinal: Tells equal requests apart that are to have different answers.

        Raises:
            ModelError: As `Client.ask`; or it no longer shows what it showed when it was probed.
        """
        path, body = path_and_body(self.client.address.model, prefix, wanted, self.by)
        found = self.client.ask(
            path,
            body,
            self.reader(wanted),
            ordinal=ordinal,
            estimate=self.estimate(prefix, wanted),
        )
        self.check_tokens(prefix, found)
        return found

    def check_tokens(self, prefix: Prefix, answers: Answers) -> None:
        """Warn where an answer shows that the tokenizer is not the host's.

        Args:
            prefix: What the host was sent just now.
            answers: What it has answered.
        """
        if self.tokens is None or self.client.doubts_tokens:
            return
        is_chat = prefix.message is not None
        told = None if prefix.token_ids is not None else self.client.counts.told(chat=is_chat)
        if told is not None and told[0] != _sent(prefix):
            told = None
        if why := misfit(self.tokens, told, answers, chat=is_chat):
            self.client.doubt_tokens(why)

    def reader(self, wanted: Wanted, *, is_look: bool = False) -> Reader:
        """What takes the answer apart.

        Args:
            wanted: What was asked for.
            is_look: It is not known yet how much of it is shown.
        """
        if self.by.dialect == "anthropic":
            return read_messages
        logprobs, top, echo = bool(wanted.top), None if is_look else wanted.top, wanted.echo
        return lambda raw: read_answers(raw, logprobs=logprobs, top=top, echo=echo)

    def prefix(self, text: str, message: str | None, token_ids: list[int]) -> Prefix:
        """What it goes on from, in tokens where it takes these and their text is known."""
        by_ids = message is None and self.takes_tokens
        return Prefix(text, message, token_ids if by_ids else None)

    @property
    def takes_tokens(self) -> bool:
        """Its tokens are known, and it takes them for a prompt."""
        return self.tokens is not None and self.by.token_prompts

    def count(self, text: str) -> int:
        """Tokens of a text, or more than it is likely to have."""
        if (tokens := self._trusted) is not None:
            return len(tokens.encode(text))
        return int(len(text.encode()) / self.client.counts.bytes_a_token) + 1

    def count_read(self, text: str, *, chat: bool) -> int:
        """Tokens that it reads where it is sent a text or a message; or about as many."""
        if (tokens := self._trusted) is None:
            return self.client.counts.likely(text, chat=chat)
        return len(tokens.encode(text)) + self._around(tokens, chat=chat)

    def way_of_counting(self, *, chat: bool) -> str:
        """How tokens of prompts are counted, in words; empty where the count is exact."""
        if self._trusted is not None:
            return "not knowing the chat's template" if chat else ""
        each = self.client.counts.bytes_a_token
        said = ", as the API counts" if each < BYTES_A_TOKEN else ""
        template = "; not knowing the chat's template" if chat else ""
        return f"a token taken for {each:.1f} bytes{said}{template}"

    def allows(self, prefix: Prefix, wanted: Wanted) -> bool:
        """Whether a call stays within the budget."""
        return self.client.ledger.allows(self.estimate(prefix, wanted))

    def estimate(self, prefix: Prefix, wanted: Wanted) -> Usage:
        """What a call takes at most, as far as that can be known."""
        text, is_chat = _sent(prefix), prefix.message is not None
        if prefix.token_ids is not None:
            prompt = len(prefix.token_ids)
        elif self._trusted is not None:
            prompt = self.count_read(text, chat=is_chat)
        else:
            prompt = self.client.counts.most(text, chat=is_chat)
        return Usage(prompt, length(wanted, self.by) * wanted.count)

    @property
    def _trusted(self) -> KnownTokens | None:
        """Its tokenizer, if what the API says goes with it."""
        return None if self.client.doubts_tokens else self.tokens

    def _around(self, tokens: KnownTokens, *, chat: bool) -> int:
        """Tokens that it reads around a text or a message, by its own tokenizer."""
        least = TEMPLATE_TOKENS if chat else len(tokens.context_ids())
        if (told := self.client.counts.told(chat=chat)) is None:
            return least
        around = told[1] - len(tokens.encode(told[0]))
        return max(0, around) if chat else min(max(least, around), SPECIAL_TOKENS)

    def check_way(self, *, chat: bool) -> None:
        """Refuse a way of asking that the API does not have.

        Raises:
            ModelError: It answers messages only, or continues texts only.
        """
        if chat and not self.by.chat:
            raise ModelError(
                f"{self.client.address.url} has no chat", hint="leave out --chat: it continues text"
            )
        if not chat and not self.by.completions:
            raise ModelError(
                f"{self.client.address.url} continues no texts, it answers messages only",
                hint="use --chat",
            )


def _sent(prefix: Prefix) -> str:
    """All that is sent as text."""
    return (prefix.message or "") + prefix.text
