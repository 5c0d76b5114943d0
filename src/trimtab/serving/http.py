"""HTTP/1.1 as uvicorn speaks it, with errors like all others and an end to waiting."""

import asyncio
from typing import Any, final

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from trimtab.serving.refusals import ApiError, as_json

HEAD_SEC = 60.0
"""Time for a request's head to come."""


@final
class Http(H11Protocol):
    """A connection whose client is told in JSON what is no HTTP, and is not waited for for ever.

    Uvicorn waits without end for the rest of a head, and tells what is no HTTP as plain text; where
    an answer has begun already, telling it a second time fails.
    """

    _patience: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:
        """Begin to wait for a request."""
        super().connection_made(transport)
        self._watch_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """Wait for nothing any more."""
        self._stop_waiting()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Read on."""
        super().data_received(data)
        self._watch_head()

    def send_400_response(self, msg: str) -> None:
        """Tell that this is no HTTP, and hang up."""
        del msg
        self._refuse(ApiError(400, "the request is not valid HTTP/1.1", code="invalid_http"))

    def _watch_head(self) -> None:
        # There is none before the first request, whatever uvicorn says of its type.
        cycle: Any = self.cycle
        is_waiting = cycle is None or cycle.response_complete
        if not is_waiting:
            self._stop_waiting()
        elif self._patience is None:
            self._patience = self.loop.call_later(HEAD_SEC, self._lose_patience)

    def _stop_waiting(self) -> None:
        if self._patience is not None:
            self._patience.cancel()
            self._patience = None

    def _lose_patience(self) -> None:
        self._refuse(ApiError(408, "the request did not come to its end", code="timeout"))

    def _refuse(self, error: ApiError) -> None:
        if self.transport.is_closing():
            return
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            body = as_json(error.content).encode()
            headers = [("content-type", "application/json"), ("connection", "close")]
            headers.append(("content-length", str(len(body))))
            response = h11.Response(status_code=error.status_code, headers=headers)
            for event in (response, h11.Data(data=body), h11.EndOfMessage()):
                self.transport.write(self.conn.send(event) or b"")
        self.transport.close()
