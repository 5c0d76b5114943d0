"""A server's parts, put together, and how it answers one request."""

from collections import Counter, defaultdict
from collections.abc import AsyncGenerator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TextIO, final

from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from trimtab.backends.hf import HFModel
from trimtab.config import ServeConfig
from trimtab.serving.adapters import Adapters
from trimtab.serving.answers import Answer, Writer
from trimtab.serving.doorkeeper import Doorkeeper
from trimtab.serving.engine import Engine, has_room
from trimtab.serving.events import EventStream, Mailbox, until_gone
from trimtab.serving.gate import GONE
from trimtab.serving.prepare import Preparer
from trimtab.serving.protocol import ChatRequest, Request
from trimtab.serving.refusals import as_json, json_response, refusal
from trimtab.serving.watch import Record, Watch
from trimtab.serving.work import Done, Job, Piece

MOST_IN_PREPARATION = 256
"""Requests whose prompts may wait for the tokenizer; only then are they sound, or in the queue."""

STREAM_GRACE_SEC = 30.0
"""Time that a reader has beyond a request's own limit to fetch what was written."""


@dataclass
class _Collected:
    answers: list[Answer]
    done: Done | None = None


@final
class Service:
    """What answers requests."""

    def __init__(self, config: ServeConfig, host: HFModel, log: TextIO | None) -> None:
        """Put the parts together; the engine does not run yet.

        Args:
            config: The server's.
            host: The host.
            log: Where lines of JSON go; None for nowhere.

        Raises:
            InputError: The file of keys cannot be used.
            ModelError: The host's rows cannot be batched.
        """
        self.config = config
        self.host = host
        self.adapters = Adapters(config, host)
        self.engine = Engine(host, slots=config.slots, queue=config.queue)
        self.watch = Watch(self.engine, log)
        self.doorkeeper = Doorkeeper(
            config.keys,
            config.requests_per_minute,
            complain=lambda what: self.watch.say("keys", level="error", message=what),
        )
        self.is_closing = False
        self._preparer = Preparer(config, self.adapters)
        # Tokenizers are not made to be used by several threads.
        self._preparing = ThreadPoolExecutor(1, "trimtab-prepare")
        # One thread for all: each that multiplies matrices keeps helpers of its own.
        self.loading = ThreadPoolExecutor(1, "trimtab-load")
        self._in_preparation = Counter[str]()

    def close(self) -> None:
        """End everything."""
        self.is_closing = True
        self.engine.stop()
        self._preparing.shutdown(cancel_futures=True)
        self.loading.shutdown(cancel_futures=True)

    async def answer(self, http: HttpRequest, request: Request) -> Response:
        """Answer a request, whole or as a stream.

        Args:
            http: The request as it came.
            request: The request, checked by itself.

        Raises:
            Exception: It cannot be answered; `refusal` says what the client is told.
        """
        record: Record = http.state.record
        mailbox = Mailbox()
        loop = mailbox.loop
        owner = record.key or ""
        room = MOST_IN_PREPARATION - self._in_preparation.total()
        if not has_room(owner, self._in_preparation[owner], room):
            raise self.engine.busy()
        self._in_preparation[owner] += 1
        try:
            job: Job = await loop.run_in_executor(
                self._preparing, self._preparer.job, request, mailbox.tell, owner
            )
        finally:
            self._in_preparation[owner] -= 1
        record.model = self.adapters.plain_name(request.model)
        record.fields |= {"stream": bool(request.stream), "prompt_tokens": job.prompt_tokens}
        if self.config.log_prompts:
            record.fields["request"] = request.model_dump(mode="json", exclude_unset=True)
        self.engine.submit(job)
        chat = isinstance(request, ChatRequest)
        has_logprobs = job.options.top_logprobs is not None
        writer = Writer(self.host, request.model, chat=chat, has_logprobs=has_logprobs)
        if request.stream:
            return EventStream(
                lambda: self._lines(request, job, mailbox, writer, record),
                job,
                mailbox,
                record,
                self.config.time_limit_sec + STREAM_GRACE_SEC,
            )
        try:
            async with until_gone(http.receive, job, mailbox):
                collected = await _collect(job, mailbox)
        finally:
            self._note(record, job)
        if collected.done is None:
            record.fields["status"] = GONE
            return json_response({})
        answers = collected.answers
        if self.config.log_prompts:
            record.fields["answers"] = ["".join(answer.text) for answer in answers]
        return json_response(writer.whole(answers, collected.done))

    async def _lines(
        self, request: Request, job: Job, mailbox: Mailbox, writer: Writer, record: Record
    ) -> AsyncGenerator[str]:
        has_begun, texts = False, defaultdict[int, list[str]](list)
        try:
            while (event := await mailbox.next()) is not None:
                if isinstance(event, Piece):
                    if self.config.log_prompts:
                        texts[event.choice].append(event.text)
                    for chunk in writer.chunks(event, usage_follows=request.includes_usage):
                        yield as_json(chunk)
                elif isinstance(event, Done):
                    if request.includes_usage:
                        yield as_json(writer.last(event))
                    yield "[DONE]"
                    return
                else:
                    record.failed(event.error)
                    if not has_begun:
                        raise event.error
                    told = refusal(event.error)
                    # The response has begun with 200; the log and the metrics know better.
                    record.fields |= {"status": told.status_code, "code": told.code}
                    yield as_json(told.content)
                    return
                has_begun = True
        finally:
            if self.config.log_prompts:
                record.fields["answers"] = ["".join(texts[choice]) for choice in sorted(texts)]
            self._note(record, job)

    def _note(self, record: Record, job: Job) -> None:
        record.fields["completion_tokens"] = job.completion_tokens
        if job.first_text_sec is not None:
            record.fields["first_text_sec"] = round(job.first_text_sec - job.began_sec, 4)


async def _collect(job: Job, mailbox: Mailbox) -> _Collected:
    """All answers of a request.

    Raises:
        Exception: It failed; what the engine has told.
    """
    collected = _Collected([Answer() for _ in range(len(job.prompts) * job.options.answers)])
    while (event := await mailbox.next()) is not None:
        if isinstance(event, Piece):
            answer = collected.answers[event.choice]
            answer.text.append(event.text)
            answer.tokens += event.tokens
            answer.trace += event.trace
            answer.finish = event.finish
        elif isinstance(event, Done):
            collected.done = event
            break
        else:
            raise event.error
    return collected
