"""One answer in the making: its tokens, its text, and how its adapters are asked."""

from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import count
from typing import final

import torch
from torch import Tensor

from trimtab.backends.chat import ChatPrompt
from trimtab.backends.live import Live
from trimtab.backends.reading import RowText
from trimtab.serving.choose import choose
from trimtab.serving.trace import Speller, Tracer
from trimtab.serving.work import Finish, Job, Likely, Piece
from trimtab.steering.evidence import readable, text_before
from trimtab.steering.explain import Explanation
from trimtab.steering.predictors import Rows
from trimtab.text.stream import TextStream
from trimtab.vocab import Vocabulary

SEED_STEP = 0x9E3779B97F4A7C15
"""Between the seeds of a request's answers; far from the seeds that people choose."""

_numbers = count()


def next_number() -> int:
    """A number that names a row, or what small models read of one, in this process alone."""
    return next(_numbers)


@final
class Row:
    """One answer in the making."""

    def __init__(
        self, job: Job, prompt: int, answer: int, vocabulary: Vocabulary, speller: Speller
    ) -> None:
        """Begin the answer.

        Args:
            job: The request.
            prompt: Which of its prompts.
            answer: Which answer to it.
            vocabulary: The host's.
            speller: Of the host's tokens.
        """
        options = job.options
        self.job = job
        self.choice = prompt * options.answers + answer
        self.number = next_number()
        self.token_ids = list(job.prompts[prompt].token_ids)
        self.prompt_tokens = len(self.token_ids)
        self.pieces = [vocabulary.token_bytes[i] for i in self.token_ids]
        self.weights: Tensor | None = None
        self.has_ended = False
        self._vocabulary = vocabulary
        self._stream = TextStream(options.stop)
        self.tracer: Tracer | None = None
        if options.trace != "none":
            self.tracer = Tracer(speller, tells_text=options.trace == "text")
        self._held: list[tuple[int, Likely]] = []
        self._held_trace: list[tuple[int, Explanation]] = []
        self._written_bytes = 0
        self._counts: Counter[int] = Counter()
        # Any seed is 64 bits; answers to one request must differ, and not be those of another seed.
        seed = (options.seed + self.choice * SEED_STEP) % 2**63
        self._generator = torch.Generator().manual_seed(seed)

    @property
    def new_tokens(self) -> int:
        """Tokens of the answer so far."""
        return len(self.token_ids) - self.prompt_tokens

    def write(self, logprobs: Tensor, end_ids: frozenset[int]) -> Piece:
        """Choose the next token and say what is new.

        Args:
            logprobs: The steered distribution, shape [vocab].
            end_ids: Tokens that end an answer.
        """
        options = self.job.options
        token_id = choose(logprobs, options.choosing, self._counts, self._generator)
        if token_id in end_ids:
            if options.tells_end:
                self._hold(logprobs, token_id)
            return self.end("stop")
        self._counts[token_id] += 1
        piece = self._vocabulary.token_bytes[token_id]
        self.token_ids.append(token_id)
        self.pieces.append(piece)
        self.job.completion_tokens += 1
        self._hold(logprobs, token_id)
        if self.tracer:
            why = self.tracer.explained(token_id, piece or b"", logprobs)
            self._held_trace.append((self._written_bytes, why))
        self._written_bytes += len(piece or b"")
        text = self._stream.add(piece or b"")
        if self._stream.stopped:
            return self.end("stop", text)
        if self.new_tokens >= options.max_tokens:
            return self.end("length", text)
        return self._piece(text) if text else Piece(self.choice, text)

    def _hold(self, logprobs: Tensor, token_id: int) -> None:
        top = self.job.options.top_logprobs
        if top is not None:
            self._held.append((self._written_bytes, likely(logprobs, token_id, top)))

    def end(self, why: Finish, text: str = "") -> Piece:
        """Give out what was held back."""
        self.has_ended = True
        text += self._stream.finish()
        if self._stream.stopped:
            shown = len(self._stream.text.encode())
            self._held = [(begin, told) for begin, told in self._held if begin < shown]
            self._held_trace = [(begin, one) for begin, one in self._held_trace if begin < shown]
        return self._piece(text, why)

    def _piece(self, text: str, why: Finish | None = None) -> Piece:
        """Text with all that was held back until it was certain."""
        told = tuple(one for _, one in self._held)
        trace = tuple(one for _, one in self._held_trace)
        self._held, self._held_trace = [], []
        return Piece(self.choice, text, told, why, trace)

    def branch(self, others: Sequence["Row"]) -> None:
        """Let answers to the same prompt go on from what was read and said here."""
        for other in others:
            if other.tracer and self.tracer:
                other.tracer.hear_as(self.tracer)
        for live in self._lives():
            live.branch(self.number, [other.number for other in others])

    def context(self, chat: ChatPrompt | None) -> bytes:
        """The text before the next token; of a chat the message and the answer.

        Args:
            chat: How an adapter's small model reads the prompt, where it is a chat.
        """
        said = text_before(self.pieces[chat.message.start : chat.message.stop]) if chat else b""
        return said + text_before(self.pieces[self._answer_start(chat) :])

    def small_text(self, chat: ChatPrompt | None) -> RowText:
        """What an adapter's small models are to read before the next token; as for `context`."""
        start = self._answer_start(chat)
        answer = readable(text_before(self.pieces[start:]))
        pairs = zip(self.token_ids[start:], self.pieces[start:], strict=True)
        ids = [token_id for token_id, piece in pairs if piece]
        # Where a prompt ends says nothing about how the host would read what follows it.
        last = self.token_ids[-1] if self.new_tokens and self.pieces[-1] else None
        return RowText(self.number, answer, ids, last, chat.small_ids if chat else None)

    def _answer_start(self, chat: ChatPrompt | None) -> int:
        return self.prompt_tokens if chat else 0

    def forget(self) -> None:
        """Let go of what small models keep of this answer."""
        for live in self._lives():
            live.forget(self.number)

    def _lives(self) -> list[Live]:
        """The small models that run beside the host for this answer."""
        mixtures = self.job.steered.several.mixtures if self.job.steered else ()
        return [mixture.steering.live for mixture in mixtures if mixture.steering.live]


def steer(rows: Sequence[Row], logits: Tensor, hidden: Tensor) -> Tensor:
    """The steered distribution of rows that the same mixtures steer, shape [rows, vocab].

    Args:
        rows: Their requests have equal `Steered.several`.
        logits: The host's own, shape [rows, vocab].
        hidden: The states that gave them, shape [rows, hidden].
    """
    first = rows[0].job.steered
    assert first is not None
    asked = []
    for place, mixture in enumerate(first.several.mixtures):
        chats, live = list(_chats(rows, place)), mixture.steering.live
        readings = live.read_rows([row.small_text(chat) for row, chat in chats]) if live else ()
        questions = tuple((reading, range(1)) for reading in readings)
        contexts = tuple(row.context(chat) for row, chat in chats)
        asked.append(Rows(logits, hidden, contexts, questions, strangers=True))
    weights = [row.weights for row in rows if row.weights is not None]
    trust = torch.stack(weights, 1)
    said = first.several.said(asked)
    for place, row in enumerate(rows):
        if row.tracer:
            tells = row.tracer.tells_text
            row.tracer.voices = first.several.voices(said, trust, place, tells_text=tells)
    return first.several.mixed(said, trust)


def _chats(rows: Sequence[Row], place: int) -> Iterator[tuple[Row, ChatPrompt | None]]:
    for row in rows:
        assert row.job.steered is not None
        yield row, row.job.steered.chats[place]


def likely(logprobs: Tensor, token_id: int, top: int) -> Likely:
    """A token, how likely it was, and what was likeliest.

    Args:
        logprobs: The distribution, shape [vocab].
        token_id: The token.
        top: How many of the likeliest.
    """
    found = logprobs.topk(min(top, len(logprobs))) if top else None
    pairs = zip(found.indices.tolist(), found.values.tolist(), strict=True) if found else ()
    return Likely(token_id, float(logprobs[token_id]), tuple(pairs))
