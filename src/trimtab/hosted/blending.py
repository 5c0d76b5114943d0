"""The next token of a host that shows its likeliest ones, blended with expert and reference."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from trimtab.align.strings import is_whole
from trimtab.backends.live import Live
from trimtab.backends.reading import LiveReading, RowText
from trimtab.blend import mixture_logprobs
from trimtab.hosted.answers import Place, Token
from trimtab.hosted.tokens import KnownTokens, ToldTokens, expected_texts, shown_ids
from trimtab.steering.evidence import (
    EVIDENCE_TOKENS,
    Mixture,
    last_text,
    readable,
    text_before,
    text_ids,
)
from trimtab.steering.truncated import EXPECTED, Shown, fair_evidence, truncated
from trimtab.steering.unseen import rank_prior


@dataclass(frozen=True)
class Option:
    """A token that may come next.

    Attributes:
        text: Its bytes; None for one that stands for no text.
        token_id: Of the host, where its tokens are known.
        ends: It ends the continuation.
    """

    text: bytes | None
    token_id: int | None
    ends: bool


@dataclass(frozen=True)
class Options:
    """All tokens that may come next.

    Attributes:
        each: The tokens.
        logprobs: The steered natural-log probabilities, shape [options]; -inf for what cannot be
            sent back to the host. What is missing to one belongs to tokens that are not here.
        others: As `logprobs`, without the part of them that is the host's own.
    """

    each: tuple[Option, ...]
    logprobs: Tensor
    others: Tensor


@dataclass(frozen=True)
class Before:
    """What stands before a place.

    Attributes:
        context: All bytes; in a chat, of the answer.
        host_ids: The host's tokens of it, where these are known.
        host_last: The last of them, where the host has written it.
        start: What the small models read before it (default: what they expect before any text).
    """

    context: bytes
    host_ids: Sequence[int] | None = None
    host_last: int | None = None
    start: Sequence[int] | None = None


@final
class Blender:
    """Blends places of one text, one after another."""

    def __init__(
        self, mixture: Mixture, live: Live, tokens: KnownTokens | None, *, by_ids: bool
    ) -> None:
        """Begin with the adapter's own trust in its predictors.

        Args:
            mixture: What steers: the expert's blends alone.
            live: Expert and reference; beside the host's tokens, where these are known.
            tokens: The host's tokens.
            by_ids: The host is sent tokens. Otherwise it is sent text, so that no token may end
                inside a character.
        """
        self._mixture = mixture
        self._live = live
        self._tokens = tokens
        self._by_ids = by_ids
        self._weights = mixture.prior
        self._prior = None if tokens is None else rank_prior(tokens.vocabulary)

    @property
    def live(self) -> Live:
        """Expert and reference."""
        return self._live

    def weigh(self, places: Sequence[Place]) -> None:
        """Trust each predictor as far as a prompt speaks for it (`Mixture.weigh`, `fair_evidence`).

        Args:
            places: The prompt's tokens, as the host has read them; nothing is known of the first.
        """
        pieces = [place.chosen.text for place in places]
        asked = [i for i in range(1, len(places)) if pieces[i] and places[i].top]
        asked = asked[-EVIDENCE_TOKENS:]
        if not asked:
            return
        ids = self._ids([place.chosen for place in places])
        befores = [
            Before(
                text_before(pieces[:i]),
                None if ids is None else text_ids(ids, pieces, 0, i),
                None if ids is None else last_text(ids, pieces, i),
            )
            for i in asked
        ]
        reading = self._read(befores)
        scores = [self._score(reading, number, places[i]) for number, i in enumerate(asked)]
        chosen = [places[i].chosen.logprob for i in asked]
        was_shown = torch.tensor([places[i].shows_chosen for i in asked])
        self._weights = self._mixture.weights_after(
            fair_evidence(torch.stack(scores, 1), torch.tensor(chosen), was_shown)
        )

    def can_read(self, before: Before) -> bool:
        """Whether the small models can read what stands before a place."""
        context, ids = readable(before.context), before.host_ids
        assert ids is not None or not self._live.is_one_vocabulary
        ids = ids or ()
        return self._live.can_read(RowText(0, context, ids, start=before.start))

    def options(self, before: Before, top: Sequence[Token]) -> Options:
        """What may come next, steered.

        Args:
            before: What stands before the place.
            top: The likeliest tokens that the host shows there.
        """
        said, options = self._said(self._read([before], row=0), 0, top)
        logprobs = mixture_logprobs(said, self._weights[:, None])[:-1]
        share = (1.0 - self.host_share) or 1.0
        others = mixture_logprobs(said[1:], self._weights[1:, None] / share)[:-1]
        unsendable = ~torch.tensor([self._is_sendable(option) for option in options])
        return Options(
            options,
            logprobs.masked_fill(unsendable, -torch.inf),
            others.masked_fill(unsendable, -torch.inf),
        )

    @property
    def host_share(self) -> float:
        """How far the bare host is trusted: its part of the mixture, in [0, 1]."""
        return float(self._weights[0])

    def option_of(self, token: Token) -> Option | None:
        """A token that the host has drawn; None if it cannot be sent back."""
        if self._tokens is None:
            if not token.is_readable:
                return None
            option = self._option(token.text, 0)
        else:
            token_id = self._tokens.id_of(token)
            if token_id is None:
                return None
            option = self._option(self._tokens.vocabulary.token_bytes[token_id], token_id)
        return option if self._is_sendable(option) else None

    def _is_sendable(self, option: Option) -> bool:
        return self._by_ids or option.ends or (option.text is not None and is_whole(option.text))

    def _score(self, reading: LiveReading, number: int, place: Place) -> Tensor:
        """What each predictor gives to the token that stands at a place, shape [predictors]."""
        said, options = self._said(reading, number, place.top)
        texts = [option.text for option in options]
        if place.chosen.text not in texts:
            # Neither shown nor expected: the tail's share would be all of its tokens'.
            return torch.full((len(said),), place.chosen.logprob)
        return said[:, texts.index(place.chosen.text)]

    def _said(
        self, reading: LiveReading, number: int, top: Sequence[Token]
    ) -> tuple[Tensor, tuple[Option, ...]]:
        """Log-probabilities of each predictor, [predictors, options + 1], and the options."""
        question, steering = range(number, number + 1), self._mixture.steering
        if self._tokens is not None:
            live, texts = self._live, self._tokens.vocabulary.token_bytes
            row = shown_ids(top, [self._tokens.id_of(token) for token in top])
            wanted, prior = live.expected(reading, question, EXPECTED), self._prior
        else:
            expected = expected_texts(self._live, reading, question, EXPECTED)
            told = ToldTokens.of(top, expected)
            live, texts = self._live.onto(told), told.vocabulary.token_bytes
            row = shown_ids(top, told.ids_of(top))
            wanted, prior = torch.arange(len(texts)), None
        shown = Shown.of([row], wanted, prior)
        found = truncated(steering, live, reading, question, shown)
        options = tuple(self._option(texts[i], i) for i in shown.token_ids.tolist())
        return torch.stack([found[name][0] for name in self._mixture.members]), options

    def _option(self, text: bytes | None, token_id: int) -> Option:
        if self._tokens is None:
            # What stands for no text cannot be sent, whatever it is.
            return Option(text, None, text is None)
        return Option(text, token_id, token_id in self._tokens.end_ids)

    def _ids(self, tokens: Sequence[Token]) -> Tensor | None:
        """The host's token ids, if all are known."""
        if self._tokens is None:
            return None
        found = [self._tokens.id_of(token) for token in tokens]
        ids = [token_id for token_id in found if token_id is not None]
        return torch.tensor(ids) if len(ids) == len(found) else None

    def _read(self, befores: Sequence[Before], row: int | None = None) -> LiveReading:
        ids = [before.host_ids for before in befores]
        return self._live.read(
            [readable(before.context) for before in befores],
            host_ids=[i for i in ids if i is not None] if None not in ids else None,
            host_lasts=[before.host_last for before in befores],
            start=befores[0].start,
            row=row,
        )
