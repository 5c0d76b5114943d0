"""One thread that owns the host and answers all requests together."""

import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from trimtab.backends.hf import HFModel
from trimtab.errors import ModelError
from trimtab.serving.batch import Batch, check_host
from trimtab.serving.reading import Reading
from trimtab.serving.rows import Row, steer
from trimtab.serving.trace import Speller
from trimtab.serving.turns import Turns
from trimtab.serving.work import Busy, Closing, Done, Failed, Job, Piece, TimeUp

TURN_SEC, TURN_STEPS, LONGEST_TURN_SEC = 0.4, 4, 2.0
"""While answers are in the making a prompt is read for so long before they have their next step, or
for as long as so many of their steps take, whichever is longer; and never for longer than the last.
The longer a turn, the longer they pause; the shorter, the longer those wait that would share their
steps."""

QUEUE_SHARE = 3
"""An owner may have as many requests waiting as the queue has room for, times this: alone three
quarters of it, and the more owners wait, the less each (Choudhury and Hahne 1998). Of a queue of
fewer than four places one owner takes all."""

_IDLE_SEC = 1.0


def has_room(owner: str, own: int, room: int) -> bool:
    """Whether one more request of an owner may wait.

    Args:
        owner: Whose it is; empty where there are no keys, and all are one owner.
        own: Requests of this owner that wait.
        room: Places that are free.
    """
    return room > 0 and (not owner or own < QUEUE_SHARE * room)


@dataclass
class Counts:
    """What an engine has done so far, for whoever watches it.

    Attributes:
        steps: Passes of the host in which answers grew.
        stepped_rows: Answers in all of these.
        mean_job_sec: Recent time of a request, an exponential mean; 0 before the first.
    """

    steps: int = 0
    stepped_rows: int = 0
    mean_job_sec: float = 0.0


@final
class Engine:
    """Continuous batching: rows join when their prompt is read, and leave when they are done.

    A prompt is read alone, a turn between two steps. Then its rows take part in every pass of the
    host, whatever the lengths and adapters of the others; those that the same adapters steer are
    asked together. Owners of requests take turns. Those of one owner wait in order; a request of
    many prompts goes back to the end of the queue after each of them, so that it does not hold up
    those behind it.
    """

    def __init__(self, host: HFModel, *, slots: int, queue: int) -> None:
        """Prepare an engine that does not run yet.

        Args:
            host: The host, which no other thread may run from now on but to seat an adapter.
            slots: Answers in the making at once.
            queue: Requests that may wait.

        Raises:
            ModelError: The host's rows cannot be batched.
        """
        check_host(host)
        self.host = host
        self.slots = slots
        self.counts = Counts()
        self._queue = queue
        self._batch = Batch(host)
        self._speller = Speller(host)
        self._rows: list[Row] = []
        self._waiting: deque[Job] = deque()
        self._turns = Turns()
        self._reading: Reading | None = None
        self._step_sec = 0.0
        self._wake = threading.Condition()
        self._closing = False
        self._fault: Exception | None = None
        self._thread = threading.Thread(target=self._run, name="trimtab-engine", daemon=True)

    @property
    def waiting(self) -> int:
        """Requests in the queue."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """Answers in the making."""
        return len(self._rows)

    @property
    def is_alive(self) -> bool:
        """The thread runs."""
        return self._thread.is_alive()

    def start(self) -> None:
        """Begin to answer."""
        self._thread.start()

    def close(self) -> None:
        """Take nothing more, and have those who wait told so; returns at once."""
        with self._wake:
            self._closing = True
            self._wake.notify()

    def stop(self) -> None:
        """End what is in the making, as `close` does, and the thread."""
        self.close()
        if self._thread.ident is not None:
            self._thread.join()

    def submit(self, job: Job) -> None:
        """Put a request into the queue, from any thread.

        Raises:
            Busy: The queue is full, or holds its owner's share.
            Closing: The engine has been stopped.
            RuntimeError: It has ended by itself.
        """
        with self._wake:
            if self._fault:
                raise RuntimeError("the engine has ended after an error") from self._fault
            if self._closing or not self._thread.is_alive():
                raise Closing
            own = sum(other.owner == job.owner for other in self._waiting)
            if not has_room(job.owner, own, self._queue - len(self._waiting)):
                raise self.busy()
            self._waiting.append(job)
            self._wake.notify()

    def busy(self) -> Busy:
        """What a request is told that there is no room for, with when to come back."""
        # Before any answer is complete, those that are in the making say the least it takes.
        since_sec = [time.monotonic() - job.began_sec for job in self._jobs_running()]
        one_sec = self.counts.mean_job_sec or max(since_sec, default=0.0)
        mean_sec = one_sec * len(self._waiting) / self.slots
        return Busy(min(max(1, math.ceil(mean_sec)), 60))

    def _run(self) -> None:
        try:
            with torch.inference_mode():
                while self._wait_for_work():
                    self._guarded(self._drop_ended, self._jobs_running)
                    self._guarded(self._read_on, self._jobs_reading)
                    self._guarded(self._step, self._jobs_running)
        except Exception as error:
            # Nothing is answered from here on, and whoever waits must not wait for ever.
            self._fault = error
        with self._wake:
            self._closing = True
        for job in self._jobs():
            job.tell(Failed(self._fault or Closing()))

    def _wait_for_work(self) -> bool:
        with self._wake:
            while not (self._closing or self._waiting or self._reading or self._rows):
                self._wake.wait(_IDLE_SEC)
            return not self._closing

    def _guarded(self, do: Callable[[], None], jobs: Callable[[], Sequence[Job]]) -> None:
        """Whatever goes wrong ends the requests concerned; the engine only if that fails too."""
        try:
            do()
        except Exception as error:
            ended = jobs()
            for job in ended:
                job.tell(Failed(error))
            self._let_go(*ended)

    def _jobs_reading(self) -> list[Job]:
        return [self._reading.job] if self._reading else []

    def _jobs_running(self) -> list[Job]:
        return list({id(row.job): row.job for row in self._rows}.values())

    def _jobs(self) -> list[Job]:
        with self._wake:
            return [*self._waiting, *self._jobs_reading(), *self._jobs_running()]

    def _drop_ended(self) -> None:
        now_sec = time.monotonic()
        for job in self._jobs():
            if job.cancelled:
                self._let_go(job)
            elif now_sec > job.deadline_sec:
                self._fail(job, TimeUp())

    def _fail(self, job: Job, error: Exception) -> None:
        job.tell(Failed(error))
        self._let_go(job)

    def _let_go(self, *jobs: Job) -> None:
        """Drop all that is kept of some requests, at once: what the others have is copied."""
        ended = set(map(id, jobs))
        with self._wake:
            self._waiting = deque(job for job in self._waiting if id(job) not in ended)
        if self._reading and id(self._reading.job) in ended:
            self._reading.forget()
            self._reading = None
        for row in self._rows:
            row.has_ended = row.has_ended or id(row.job) in ended
        self._keep(row for row in self._rows if id(row.job) not in ended)

    def _keep(self, rows: Iterable[Row]) -> None:
        kept = set(map(id, rows))
        places = [place for place, row in enumerate(self._rows) if id(row) in kept]
        if len(places) == len(self._rows):
            return
        gone = [row for row in self._rows if id(row) not in kept]
        # What may fail, for want of memory, comes first.
        self._batch.keep(places)
        self._rows = [self._rows[place] for place in places]
        for row in gone:
            row.forget()

    def _next_prompt(self) -> Reading | None:
        with self._wake:
            if not self._waiting:
                return None
            job = self._waiting[self._turns.place([job.owner for job in self._waiting])]
            if len(self._rows) + job.options.answers > self.slots:
                return None
            self._waiting.remove(job)
            self._turns.give(job.owner, job.options.answers)
            prompt, job.next_prompt = job.next_prompt, job.next_prompt + 1
            if job.next_prompt < len(job.prompts):
                self._waiting.append(job)
        return Reading(self.host, self._batch, self._speller, job, prompt)

    def _read_on(self) -> None:
        self._reading = reading = self._reading or self._next_prompt()
        if reading is None or not reading.go_on(self._turn_sec()):
            return
        # Until then it is the one that an error ends.
        self._say_first(reading)
        self._reading = None
        # Of those that do not go on nothing is kept.
        if reading.rows[0] not in self._rows:
            reading.rows[0].forget()

    def _turn_sec(self) -> float | None:
        """How long a prompt may be read before the next step; None where no answer waits for it."""
        if not self._rows:
            return None
        return min(max(TURN_SEC, TURN_STEPS * self._step_sec), LONGEST_TURN_SEC)

    def _say_first(self, reading: Reading) -> None:
        """Begin the answers to a prompt that has been read."""
        job, rows = reading.job, reading.rows
        if reading.shown:
            for row in rows:
                job.tell(Piece(row.choice, *reading.shown))
        if not job.options.max_tokens:
            for row in rows:
                self._say(row, row.end("length"))
            return
        logprobs = self._steered(rows[:1], reading.last_hidden)
        self._batch.join(reading.cache, len(rows))
        self._rows += rows
        rows[0].branch(rows[1:])
        self._write(rows, logprobs.expand(len(rows), -1))

    def _step(self) -> None:
        if not self._rows:
            return
        began_sec = time.monotonic()
        hidden = self._batch.step([row.token_ids[-1] for row in self._rows])
        self.counts.steps += 1
        self.counts.stepped_rows += len(self._rows)
        self._write(list(self._rows), self._steered(self._rows, hidden))
        took_sec = time.monotonic() - began_sec
        self._step_sec = 0.8 * self._step_sec + 0.2 * took_sec if self._step_sec else took_sec

    def _steered(self, rows: Sequence[Row], hidden: Tensor) -> Tensor:
        """The distribution of each row's next token, [rows, vocab]; a row may end here."""
        unembedding = self.host.unembedding
        logits = unembedding.logits(hidden.to(unembedding.weight.device)).float()
        groups: dict[int | None, list[int]] = {}
        for place, row in enumerate(rows):
            if row.tracer:
                row.tracer.hear(logits[place].log_softmax(-1))
            steered = row.job.steered
            groups.setdefault(id(steered.several) if steered else None, []).append(place)
        parts = [
            part for group in groups.values() for part in self._said(rows, group, logits, hidden)
        ]
        # Rows of the vocabulary are large: where all are asked together nothing is copied.
        if len(parts) == 1 and len(parts[0][0]) == len(rows):
            return parts[0][1]
        logprobs = torch.empty_like(logits)
        for places, found in parts:
            logprobs[places] = found
        return logprobs

    def _said(
        self, rows: Sequence[Row], places: Sequence[int], logits: Tensor, hidden: Tensor
    ) -> Iterator[tuple[Sequence[int], Tensor]]:
        """Give the places and distributions of rows that are asked together, unless they end."""
        asked = [rows[place] for place in places]
        if len(places) < len(rows):
            own = logits[places], hidden[places]
        else:
            own = logits, hidden
        try:
            found = steer(asked, *own) if asked[0].job.steered else own[0].log_softmax(-1)
        except Exception as error:
            # Whatever is wrong with one of them, the others are none the worse for it.
            if len(asked) == 1:
                self._end_unsteered(asked[0], error)
                return
            for place in places:
                # A job that fails ends all of its rows.
                if not rows[place].has_ended:
                    yield from self._said(rows, [place], logits, hidden)
            return
        yield places, found

    def _end_unsteered(self, row: Row, error: Exception) -> None:
        if not row.new_tokens:
            raise error
        if isinstance(error, ModelError):
            # It has grown longer than its small models can read.
            self._say(row, row.end("length"))
        else:
            self._fail(row.job, error)

    def _write(self, rows: Sequence[Row], logprobs: Tensor) -> None:
        for row, distribution in zip(rows, logprobs, strict=True):
            if row.has_ended:
                continue
            try:
                piece = row.write(distribution, self.host.end_ids)
            except Exception as error:
                # What is wrong with one answer's distribution is nothing to the others.
                self._fail(row.job, error)
            else:
                self._say(row, piece)
        self._keep(row for row in self._rows if not row.has_ended)

    def _say(self, row: Row, piece: Piece) -> None:
        job = row.job
        if piece.text and job.first_text_sec is None:
            job.first_text_sec = time.monotonic()
        if piece.text or piece.tokens or piece.trace or piece.finish:
            job.tell(piece)
        if piece.finish is None:
            return
        job.open_rows -= 1
        if job.open_rows == 0:
            job.tell(Done(job.prompt_tokens, job.completion_tokens))
            took_sec, mean_sec = time.monotonic() - job.began_sec, self.counts.mean_job_sec
            self.counts.mean_job_sec = 0.8 * mean_sec + 0.2 * took_sec if mean_sec else took_sec
