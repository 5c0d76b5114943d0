"""From the engine's thread to a client: events that wait in the client's own queue."""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from typing import final

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from trimtab.serving.gate import GONE
from trimtab.serving.watch import Record
from trimtab.serving.work import Event, Job

HEADERS = {"cache-control": "no-store", "x-accel-buffering": "no"}


@final
class Mailbox:
    """Events of one request. The engine never waits for whoever reads them.

    It holds at most what the request may write, an event a token.
    """

    def __init__(self) -> None:
        """Begin empty, in the running event loop."""
        self.loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[Event | None] = asyncio.Queue()

    def tell(self, event: Event) -> None:
        """Put an event in, from any thread."""
        self.loop.call_soon_threadsafe(self._events.put_nowait, event)

    def close(self) -> None:
        """Nobody will read on; from the event loop."""
        self._events.put_nowait(None)

    async def next(self) -> Event | None:
        """The next event; None once it is closed."""
        return await self._events.get()


@contextlib.asynccontextmanager
async def until_gone(receive: Receive, job: Job, mailbox: Mailbox) -> AsyncIterator[None]:
    """Cancel a request whose client goes away inside, and in any case at the end."""

    async def watch() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        job.cancel()
        mailbox.close()

    watcher = asyncio.create_task(watch())
    try:
        yield
    finally:
        # Without effect where it is done.
        job.cancel()
        watcher.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await watcher


@final
class EventStream(Response):
    """Server-sent events, for as long as somebody reads and time is left."""

    media_type = "text/event-stream"

    def __init__(
        self,
        lines: Callable[[], AsyncGenerator[str]],
        job: Job,
        mailbox: Mailbox,
        record: Record,
        time_limit_sec: float,
    ) -> None:
        """Prepare a stream.

        Args:
            lines: The data of each event.
            job: Cancelled when the stream ends, however it ends.
            mailbox: Closed when the client has gone.
            record: Told if the client goes, or is too slow.
            time_limit_sec: After which a reader that does not read is let go of.
        """
        super().__init__(None, headers=HEADERS)
        self._lines = lines
        self._job = job
        self._mailbox = mailbox
        self._record = record
        self._time_limit_sec = time_limit_sec

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send all events; what fails before the first of them is an ordinary error."""
        del scope
        with contextlib.suppress(TimeoutError):
            async with (
                asyncio.timeout(self._time_limit_sec),
                until_gone(receive, self._job, self._mailbox),
            ):
                # Closed in any case: its end is noted before the log has its line.
                async with contextlib.aclosing(self._lines()) as lines:
                    await self._send_all(lines, send)

    async def _send_all(self, lines: AsyncGenerator[str], send: Send) -> None:
        line = await anext(lines, None)
        # What the log is to say if the stream does not come to its end, whatever ends it.
        self._record.fields["status"] = GONE
        headers = [pair for pair in self.raw_headers if pair[0] != b"content-length"]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        while line is not None:
            body = f"data: {line}\n\n".encode()
            await send({"type": "http.response.body", "body": body, "more_body": True})
            line = await anext(lines, None)
        await send({"type": "http.response.body", "body": b"", "more_body": False})
        if self._job.has_ended and self._record.fields["status"] == GONE:
            del self._record.fields["status"]
