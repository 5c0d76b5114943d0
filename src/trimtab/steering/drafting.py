"""Drafts for a host to verify: what the text repeats, or what the expert expects of it."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import final

import torch
from torch import Tensor

from trimtab.align.covers import Cover, covers_of
from trimtab.backends.hf import HFModel
from trimtab.backends.live import Live
from trimtab.steering.evidence import readable
from trimtab.steering.repeats import Repeats

UNLIKELY = 0.3
"""The expert stops where it finds all that it has drafted less likely than this."""

_SLACK = 8
"""Tokens by which some way to read a drafted text may exceed the draft."""

REPEATED_BYTES = 8
"""Bytes that are looked up for each token of a draft: more than most tokens have."""

Propose = Callable[[Sequence[int], Tensor], tuple[int, Tensor | None] | None]
"""From the tokens drafted so far and the expert's logits over the host's tokens, shape [vocab], to
the next one and what it was drawn from, shape [vocab], None for the likeliest; or to None where no
token that the expert knows may follow."""


@dataclass(frozen=True)
class Draft:
    """Host tokens that may follow.

    Attributes:
        token_ids: The tokens.
        proposals: What each was drawn from, shape [vocab of host]; None for one that was certain.
    """

    token_ids: list[int] = field(default_factory=list)
    proposals: list[Tensor | None] = field(default_factory=list)

    def __len__(self) -> int:
        """Number of tokens."""
        return len(self.token_ids)


@dataclass(frozen=True)
class Written:
    """A text that a host is writing, as the expert is to read it.

    Attributes:
        context: All bytes before the next token; in a chat, of the answer.
        host_ids: The host's tokens of that text.
        start: What the small models read before it (default: what they expect before any text).
        said: What the text answers, as bytes, in a chat.
    """

    context: bytes
    host_ids: Sequence[int]
    start: Sequence[int] | None
    said: bytes = b""


@final
class Drafter:
    """Writes ahead of a host: as the text went on before, or else as the expert would."""

    def __init__(self, live: Live, host: HFModel) -> None:
        """Begin with drafts of full length."""
        self._live = live
        self._host = host
        self._repeats = Repeats()
        small, ends = live.pair.vocabulary.token_bytes, host.end_ids
        self._may_follow = torch.tensor(
            [
                i < len(small) and (text is not None or i in ends)
                for i, text in enumerate(host.vocabulary.token_bytes)
            ]
        )

    def draft(self, written: Written, room: int, propose: Propose) -> Draft:
        """Write ahead.

        Args:
            written: The text so far.
            room: Most host tokens to draft.
            propose: Chooses tokens, where host and expert have one vocabulary. Elsewhere the
                expert's likeliest bytes are drafted, and stand as the host's tokenizer cuts them.
        """
        is_one, start = self._live.is_one_vocabulary, _start(self._live, written)
        own = Cover(tuple(written.host_ids), b"") if is_one else _own_cover(self._live, written)
        line = [*start, *own.tokens]
        if repeated := self._repeated(written, line, room):
            return repeated
        if is_one:
            return self._of_tokens(line, _most(self._live, line, room), propose)
        return self._of_text(_text_after(self._live, line, room) if not own.rest else "", room)

    def _of_text(self, text: str, most: int) -> Draft:
        ids = self._host.encode_following(text)[:most] if most > 0 else []
        return Draft(list(ids), [None] * len(ids))

    def _repeated(self, written: Written, line: Sequence[int], room: int) -> Draft:
        """A draft of what the text has gone on with before, which no model is asked for."""
        most, whole = min(room, self._live.draft_tokens), written.said + written.context
        most_bytes = REPEATED_BYTES * most
        # No text has more tokens than bytes.
        if most <= 0 or most_bytes > _left(self._live, line):
            return Draft()
        draft = self._of_text(self._repeats.after(whole, most_bytes), most)
        spelled = self._host.vocabulary.token_bytes
        self._repeats.expect(len(whole), [spelled[i] or b"" for i in draft.token_ids])
        return draft

    def _of_tokens(self, line: Sequence[int], most: int, propose: Propose) -> Draft:
        draft, sure = Draft(), 1.0
        for logits in _ahead(self._live, line, draft.token_ids, most):
            padded = torch.full((len(self._may_follow),), -torch.inf)
            width = min(len(padded), len(logits))
            padded[:width] = logits[:width]
            padded[~self._may_follow] = -torch.inf
            proposed = propose(draft.token_ids, padded)
            if proposed is None:
                break
            token_id, proposal = proposed
            draft.token_ids.append(token_id)
            draft.proposals.append(proposal)
            sure *= float((padded[token_id] - padded.logsumexp(0)).exp())
            if token_id in self._host.end_ids or sure < UNLIKELY:
                break
        return draft


def text_ahead(live: Live, written: Written, room: int) -> str:
    """The expert's likeliest text, as far as it is sure of it.

    Args:
        live: The expert, beside any tokens.
        written: The text so far.
        room: Most tokens of the expert to draft.

    Returns:
        Whole characters; nothing where the text so far ends inside one.
    """
    own = _own_cover(live, written)
    return "" if own.rest else _text_after(live, [*_start(live, written), *own.tokens], room)


def _start(live: Live, written: Written) -> Sequence[int]:
    return live.pair.reference.context_ids() if written.start is None else written.start


def _own_cover(live: Live, written: Written) -> Cover:
    """A text as the small models' tokenizer cuts it."""
    text = live.caches(0).text(live.pair, follows=written.start is not None)
    return covers_of(readable(written.context), text.encode, live.pair.vocabulary)[0]


def _text_after(live: Live, line: Sequence[int], room: int) -> str:
    token_bytes, tokens, sure = live.pair.vocabulary.token_bytes, [], 1.0
    for logits in _ahead(live, line, tokens, _most(live, line, room)):
        token_id = int(logits.argmax())
        if not token_bytes[token_id]:
            break
        tokens.append(token_id)
        sure *= float((logits[token_id] - logits.logsumexp(0)).exp())
        if sure < UNLIKELY:
            break
    text = b"".join(token_bytes[token_id] or b"" for token_id in tokens)
    return text.decode("utf-8", "ignore")


def _most(live: Live, line: Sequence[int], room: int) -> int:
    return int(min(live.draft_tokens, room, _left(live, line))) if line else 0


def _left(live: Live, line: Sequence[int]) -> float:
    """Tokens that the small models can read after a line; infinite where there is no bound."""
    longest = live.pair.reference.max_tokens
    slack = 0 if live.is_one_vocabulary else _SLACK
    return math.inf if longest is None else longest - len(line) - slack


def _ahead(live: Live, line: Sequence[int], drafted: list[int], most: int) -> Iterator[Tensor]:
    """The expert's logits after a line and what its caller has drafted after it by then."""
    for _ in range(most):
        yield live.ahead.logits_after([*line, *drafted], live.caches(0))
