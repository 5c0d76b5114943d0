"""A model behind an API, as far as it can be seen."""

from dataclasses import dataclass
from typing import final

from trimtab.errors import ModelError
from trimtab.hosted.answers import Answers, read_answers, read_messages
from trimtab.hosted.capabilities import Capabilities
from trimtab.hosted.client import Client, Reader
from trimtab.hosted.ledger import Usage
from trimtab.hosted.requests import Prefix, Wanted, length, path_and_body
from trimtab.hosted.tokens import KnownTokens

BYTES_A_TOKEN = 3
"""Fewer than most texts have, where a host's tokenizer is not known: an estimate is to be high."""

TEMPLATE_TOKENS = 40
"""More than most chat templates put around a message."""


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
        return self.client.ask(
            path,
            body,
            self.reader(wanted),
            ordinal=ordinal,
            estimate=self.estimate(prefix, wanted),
        )

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
        if self.tokens is not None:
            return len(self.tokens.encode(text))
        return len(text.encode()) // BYTES_A_TOKEN + 1

    def count_read(self, text: str, *, chat: bool) -> int:
        """Tokens that it reads where it is sent a text or a message, or more than is likely."""
        if chat:
            return self.count(text) + TEMPLATE_TOKENS
        begins = 1 if self.tokens is None else len(self.tokens.context_ids())
        return self.count(text) + begins

    def allows(self, prefix: Prefix, wanted: Wanted) -> bool:
        """Whether a call stays within the budget."""
        return self.client.ledger.allows(self.estimate(prefix, wanted))

    def estimate(self, prefix: Prefix, wanted: Wanted) -> Usage:
        """What a call takes at most, or more than is likely."""
        ids, text = prefix.token_ids, (prefix.message or "") + prefix.text
        is_chat = prefix.message is not None
        prompt = len(ids) if ids is not None else self.count_read(text, chat=is_chat)
        return Usage(prompt, length(wanted, self.by) * wanted.count)

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
