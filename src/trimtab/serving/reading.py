"""A prompt that is read a piece at a time, with what its adapters are asked about it."""

import time
from dataclasses import replace
from typing import final

import torch
from torch import Tensor
from transformers import DynamicCache

from trimtab.backends.hf import HFModel
from trimtab.serving.batch import Batch
from trimtab.serving.echo import echoing
from trimtab.serving.rows import Row, next_number
from trimtab.serving.trace import Speller
from trimtab.serving.work import Job, Likely
from trimtab.steering.evidence import ReadPrompt
from trimtab.steering.pieces import Pieces

PREFILL_TOKENS = 256
"""Tokens of a new prompt that are read at once."""

PIECE_TOKENS, PIECE_PLACES = 128, 16
"""Where answers are in the making, which wait meanwhile: tokens that are read at once, and places
of the prompt about which the small models are asked. Small pieces take some more time in all."""


@final
class Reading:
    """A prompt that is being read, and the answers that begin after it.

    Attributes:
        job: Whose prompt it is.
        rows: The answers, once the first piece is read.
        cache: The host's keys and values so far.
        shown: What the answers begin with where the request wants its prompt said again.
    """

    def __init__(
        self, host: HFModel, batch: Batch, speller: Speller, job: Job, prompt: int
    ) -> None:
        """Begin to read; nothing is read yet.

        Args:
            host: The host.
            batch: Passes of the host.
            speller: Of the host's tokens.
            job: A request.
            prompt: Which of its prompts.
        """
        self.job = job
        self.rows: list[Row] = []
        self.cache = DynamicCache()
        self.shown: tuple[str, tuple[Likely, ...]] | None = None
        self._host = host
        self._batch = batch
        self._speller = speller
        self._number = prompt
        self._hidden: list[Tensor] = []
        self._done = 0
        self._others_wait = False
        self._pieces = self._read()

    @property
    def last_hidden(self) -> Tensor:
        """The host's state of the last token, shape [1, hidden]."""
        return self._hidden[-1][-1:]

    def go_on(self, turn_sec: float | None) -> bool:
        """Read on; whether all is read.

        Args:
            turn_sec: How long, before answers in the making have a step; None where none wait.
        """
        self._others_wait = turn_sec is not None
        until_sec = time.monotonic() + (turn_sec or 0.0)
        for _ in self._pieces:
            if time.monotonic() > until_sec:
                return False
        return True

    def _read(self) -> Pieces[None]:
        """Read all; between two pieces other answers may grow.

        Where they wait the small models keep in step with the host, so that they need not read
        all of the prompt at once when it is weighed.
        """
        job, vocabulary = self.job, self._host.vocabulary
        prompt = job.prompts[self._number]
        self.rows += [
            Row(job, self._number, answer, vocabulary, self._speller)
            for answer in range(job.options.answers)
        ]
        ids = prompt.token_ids
        keeps_all = job.steered is not None or job.options.echo
        steered = job.steered
        writes = job.options.max_tokens > 0
        beside = steered if steered and writes and steered.several.runs_beside else None
        while self._done < len(ids):
            if self._done:
                yield
            most = PIECE_TOKENS if self._others_wait else PREFILL_TOKENS
            chunk = ids[self._done : self._done + most]
            hidden = self._batch.read(self.cache, chunk)
            self._done += len(chunk)
            self._hidden.append(hidden if keeps_all else hidden[-1:])
            if beside and (self._others_wait or self._done < len(ids)):
                yield
                beside.several.read_ahead(self._so_far(hidden), beside.chats)
        if beside:
            yield
        # Where nothing is written, nothing is steered by these weights.
        if steered and writes:
            yield from self._weigh()
        if job.options.echo:
            yield from self._echo()

    def _weigh(self) -> Pieces[None]:
        assert self.job.steered
        several, chats = self.job.steered.several, self.job.steered.chats
        unembedding = self._host.unembedding
        weights = yield from several.weighing(unembedding, self._whole(), chats, self._few())
        for row in self.rows:
            row.weights = weights

    def _echo(self) -> Pieces[None]:
        job, prompt = self.job, self.job.prompts[self._number]
        # Small models are asked about all its tokens, from the first: the answer's own row has
        # read further by now.
        again = next_number()
        read = replace(self._whole(), row=again)
        try:
            self.shown = yield from echoing(self._host, job, prompt, read, self._few)
        finally:
            if job.steered:
                job.steered.several.forget(again)

    def _few(self) -> int | None:
        """About how many places the small models are asked in a piece; None for any number."""
        return PIECE_PLACES if self._others_wait else None

    def _whole(self) -> ReadPrompt:
        if len(self._hidden) > 1:
            self._hidden = [torch.cat(self._hidden)]
        return self._so_far(self._hidden[0])

    def _so_far(self, hidden: Tensor) -> ReadPrompt:
        """What is read of the prompt, with the states of its last tokens."""
        row = self.rows[0]
        ids, pieces = row.token_ids[: self._done], row.pieces[: self._done]
        return ReadPrompt(torch.tensor(ids), tuple(pieces), hidden, row=row.number)

    def forget(self) -> None:
        """Let go of what is read, and of what small models keep of its answers."""
        # What has been begun would keep itself alive.
        self._pieces.close()
        for row in self.rows:
            row.forget()
