"""Writing a continuation token by token with a host that shows its likeliest ones."""

from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import final

import torch
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from trimtab.errors import ModelError
from trimtab.hosted.answers import Place, Token
from trimtab.hosted.blending import Before, Blender, Option, Options
from trimtab.hosted.context import with_draft
from trimtab.hosted.host import HostedModel
from trimtab.hosted.requests import Prefix, Wanted
from trimtab.steering.drafting import Written, text_ahead
from trimtab.steering.evidence import text_before
from trimtab.text.stream import TextStream
from trimtab.types import Advance

_CHARACTER_TOKENS = 4
"""Tokens in which any character is whole: none has more bytes."""


@dataclass(frozen=True)
class Task:
    """A prompt to go on from.

    Attributes:
        prompt: A text, or in a chat a message.
        chat: It is a message.
        max_new_tokens: Longest continuation.
        small_ids: In a chat, what the small models read before the answer.
        prompt_ids: What the host reads before the continuation, where its tokens are known and it
            is no chat.
        draft: In a chat, what the expert would answer; the host is shown it with the message.
    """

    prompt: str
    chat: bool
    max_new_tokens: int
    small_ids: tuple[int, ...] | None = None
    prompt_ids: tuple[int, ...] = ()
    draft: str = ""

    @property
    def sent(self) -> str:
        """What the host is sent."""
        return with_draft(self.prompt, self.draft)


@dataclass(frozen=True)
class Sampling:
    """How a token is chosen.

    Attributes:
        temperature: 0 takes the likeliest token.
        top_p: Draw from the smallest set of tokens with this much probability.
        top_k: Draw from so many likeliest tokens; 0 for all.
        draw: Tells the host's draws for this text from those for another.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    draw: int = 0

    @property
    def is_plain(self) -> bool:
        """Tokens are drawn from the distribution as it is."""
        return self.temperature == 1.0 and self.top_p == 1.0 and not self.top_k

    def choose(self, logprobs: Tensor) -> int:
        """Place of the chosen one among natural-log probabilities of shape [options]."""
        if not self.temperature:
            return int(logprobs.argmax())
        steps = LogitsProcessorList([TemperatureLogitsWarper(self.temperature)])
        if self.top_k:
            steps.append(TopKLogitsWarper(self.top_k))
        if self.top_p < 1:
            steps.append(TopPLogitsWarper(self.top_p))
        # Any: transformers' own types ask for LongTensor, which no operation returns.
        ids: Tensor = torch.zeros(1, 1, dtype=torch.long)
        scores = steps(ids, logprobs[None].clone())  # pyright: ignore[reportArgumentType]
        return int(torch.multinomial(scores[0].softmax(-1), 1))


def places_after(context: bytes, places: Sequence[Place]) -> Sequence[Place]:
    """The places after a context; none where that cannot be told for certain.

    Args:
        context: A text.
        places: Of the same text, and of what follows it.
    """
    text = b""
    for number, place in enumerate(places):
        if text == context:
            return places[number:]
        token = place.chosen
        # Bytes may have been lost with what has no text, unless it stands before all text.
        if not token.text and (text or not token.is_readable):
            return ()
        text += token.text or b""
    return ()


@final
class Writer:
    """Writes one continuation.

    A request asks the host for one token, or for several ahead: where it can show the tokens of a
    prompt, the expert drafts text and the host reads it; elsewhere the host drafts by itself. At
    each place of a draft the steered choice decides; the first that differs from the draft ends
    it. So a draft changes how many requests are sent, and not what is chosen.

    Where tokens are drawn from the steered distribution as it is, the host's part of it is drawn by
    the host itself, and the rest here from what it has shown: a mixture is drawn from by drawing
    one of its parts first. So the host's part is its whole distribution, of which it shows a piece.
    """

    def __init__(
        self,
        host: HostedModel,
        blender: Blender,
        task: Task,
        sampling: Sampling,
        stream: TextStream,
    ) -> None:
        """Begin an empty continuation.

        Args:
            host: The host.
            blender: Steers it; made for this text alone.
            task: What to go on from.
            sampling: How tokens are chosen.
            stream: Takes the bytes.
        """
        self._host = host
        self._blender = blender
        self._task = task
        self._sampling = sampling
        self._stream = stream
        self._written: list[Option] = []
        self._is_ended = False
        self._is_steered_next = False
        self.is_cut_short = False
        self.is_outgrown = False

    @property
    def tokens(self) -> int:
        """Tokens written."""
        return len(self._written)

    def pieces(self, advance: Advance) -> Iterator[str]:
        """Write to the end; gives pieces of text as they become certain.

        Raises:
            ModelError: The API refuses, or the prompt is too long for the small models.
        """
        self._weigh_prompt()
        while not self._is_done() and not self.is_cut_short:
            places, ended = self._ask()
            followed = yield from self._follow(places, advance)
            # Where the host has ended the text, it need not show a token that says so.
            if self.is_cut_short or (followed and ended and self._ends_with_the_host()):
                return

    def _is_done(self) -> bool:
        full = self.tokens >= self._task.max_new_tokens
        return self._is_ended or full or self._stream.stopped or self.is_outgrown

    def _follow(self, places: Sequence[Place], advance: Advance) -> Generator[str, None, bool]:
        """Choose at each place as long as the host's text is the chosen one; whether it all is."""
        for place in places:
            options = self._blender.options(self._before(), place.top)
            if options.logprobs.isneginf().all():
                raise ModelError(
                    f"after {self._tail()!r} only parts of characters are shown, which cannot be"
                    " sent back as text",
                    hint="name the host's tokenizer with --api-tokenizer, so that tokens are sent",
                )
            if self._is_steered_next and not any(option.ends for option in options.each):
                # The other parts cannot say how likely an end is that has no name.
                self._is_ended = True
                return False
            option = self._chosen(options, place.chosen)
            if option.ends:
                self._is_ended = True
                return False
            self._written.append(option)
            self._is_steered_next = False
            advance(1)
            yield self._stream.add(option.text or b"")
            self.is_outgrown = not (self._is_done() or self._blender.can_read(self._before()))
            if self._is_done() or not self._is_same(option, place.chosen):
                return False
        return True

    def _chosen(self, options: Options, drawn: Token) -> Option:
        """The next token, given what the host itself has drawn there."""
        if not self._sampling.is_plain:
            return options.each[self._sampling.choose(options.logprobs)]
        if self._is_steered_next or not self._is_the_hosts_turn():
            return options.each[self._sampling.choose(options.others)]
        own = self._blender.option_of(drawn)
        # What cannot be sent back gives way to what the host has shown.
        return own or options.each[self._sampling.choose(options.logprobs)]

    def _is_the_hosts_turn(self) -> bool:
        return float(torch.rand(())) < self._blender.host_share

    def _ends_with_the_host(self) -> bool:
        """Whether the text ends where the host has ended it, without showing any place."""
        if not self._sampling.is_plain or self._is_steered_next:
            return True
        self._is_steered_next = not self._is_the_hosts_turn()
        return not self._is_steered_next

    def _is_same(self, option: Option, token: Token) -> bool:
        if option.text is None and self._host.tokens is not None:
            return self._host.tokens.id_of(token) == option.token_id
        return option.text == token.text

    def _ask(self) -> tuple[Sequence[Place], bool]:
        """Places from the next token on, and whether the host has ended its text after them."""
        room = self._task.max_new_tokens - self.tokens - 1
        top = self._host.by.top(chat=self._task.chat)
        ahead = min(room, self._blender.live.draft_tokens)
        if ahead and self._echoes and not self._sampling.is_plain:
            places = self._ask_about_draft(room, top)
            if places or self.is_cut_short:
                return places, False
        wanted = self._wanted(ahead, top)
        found = self._send(self._prefix(), wanted)
        if not any((*found, self.is_cut_short)):
            # llama.cpp shows nothing of a token until the characters that it begins are whole.
            found = self._send(self._prefix(), replace(wanted, max_tokens=_CHARACTER_TOKENS))
        if not any((*found, self.is_cut_short)):
            raise ModelError(
                f"{self._host.client.address.url} shows no token after {self._tail()!r}",
                hint="it may end inside a character there, which this API does not show; use"
                " --api-level text",
            )
        if self._is_steered_next:
            # These tokens are no draws, so that nothing after the first one follows from them.
            return found[0][:1], not found[0]
        return found

    def _wanted(self, ahead: int, top: int) -> Wanted:
        """What is asked of the host where it reads no draft of the expert's."""
        if self._is_steered_next:
            # It has ended the text where that was not its part: what else it would say is asked.
            return Wanted(1, top)
        if self._sampling.is_plain:
            return Wanted(1 + ahead, top, temperature=1.0)
        return Wanted(1 if self._echoes else 1 + ahead, top)

    def _ask_about_draft(self, room: int, top: int) -> Sequence[Place]:
        """What the host says of the expert's draft; nothing where it cuts the text otherwise."""
        before = self._before()
        written = Written(before.context, before.host_ids or (), before.start)
        draft = text_ahead(self._blender.live, written, room)
        if not draft:
            return ()
        places, _ = self._send(self._prefix(draft), Wanted(1, top, echo=True))
        found = places_after(before.context, places)[: room + 1]
        return found if found and found[0].top else ()

    def _send(self, prefix: Prefix, wanted: Wanted) -> tuple[Sequence[Place], bool]:
        if not self._host.allows(prefix, wanted):
            self.is_cut_short = True
            return (), False
        draw = self._sampling.draw if wanted.temperature else 0
        answer = self._host.go_on(prefix, wanted, ordinal=draw).choices[0]
        return answer.places, answer.ended

    def _weigh_prompt(self) -> None:
        if not self._echoes:
            return
        top = self._host.by.top(chat=False)
        places, _ = self._send(self._prefix(), Wanted(1, top, echo=True))
        # The last one is no part of the prompt.
        self._blender.weigh(places[:-1])

    @property
    def _echoes(self) -> bool:
        return self._host.by.echo and not self._task.chat

    def _tail(self) -> str:
        return self._context()[-20:].decode("utf-8", "replace")

    def _context(self) -> bytes:
        """What `Before.context` is at the next token."""
        answer = text_before([option.text for option in self._written])
        return answer if self._task.chat else self._task.prompt.encode() + answer

    def _prefix(self, draft: str = "") -> Prefix:
        task = self._task
        ids = [*task.prompt_ids, *(o.token_id for o in self._written if o.token_id is not None)]
        if draft and self._host.tokens is not None:
            ids += self._host.tokens.following(draft)
        message = task.prompt if task.chat else None
        return self._host.prefix(self._context().decode("utf-8", "ignore") + draft, message, ids)

    def _before(self) -> Before:
        context = self._context()
        if self._host.tokens is None:
            return Before(context, start=self._task.small_ids)
        texts = self._host.tokens.vocabulary.token_bytes
        ids = [i for i in self._task.prompt_ids if texts[i]]
        ids += [o.token_id for o in self._written if o.text and o.token_id is not None]
        last = self._written[-1] if self._written else None
        last = last.token_id if last and last.text else None
        return Before(context, ids, last, self._task.small_ids)
