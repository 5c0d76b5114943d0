"""What every request passes first: who asks, how often, how much; and its line in the log."""

import asyncio
import ipaddress
import secrets
import time
from collections.abc import Collection, Mapping
from typing import final

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from trimtab.serving.doorkeeper import Doorkeeper
from trimtab.serving.refusals import ApiError, refusal
from trimtab.serving.watch import Record, Watch

PAGE_FILES = ("playground.css", "playground.js")
"""What the page at / loads."""

OPEN_ROUTES = (
    *("/", "/health", "/ready", "/openapi.json"),
    *(f"/page/{name}" for name in PAGE_FILES),
)
"""These say nothing of the models, and cost nothing."""

BODY_SEC = 60.0
"""Time for a request's body to come."""

GONE = 499
"""Stands in the log for a client that did not wait."""

_ASKING = ("/v1/completions", "/v1/chat/completions")


def is_loopback(address: str) -> bool:
    """Whether only this machine reaches an address."""
    if address == "localhost":
        return True
    try:
        return ipaddress.ip_address(address.strip("[]")).is_loopback
    except ValueError:
        return False


@final
class Gate:
    """The outermost layer of the application."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        doorkeeper: Doorkeeper,
        watch: Watch,
        body_bytes: int,
        routes: Collection[str],
    ) -> None:
        """Stand before an application.

        Args:
            app: The application.
            doorkeeper: Knows the keys.
            watch: Counts and logs.
            body_bytes: Largest body.
            routes: Paths that are counted under their own name.
        """
        self._app = app
        self._doorkeeper = doorkeeper
        self._watch = watch
        self._body_bytes = body_bytes
        self._routes = frozenset(routes)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request in, or say why not."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        record = Record(scope["method"], self._route(scope["path"]), secrets.token_hex(8))
        scope.setdefault("state", {})["record"] = record
        status, has_begun = GONE, False

        async def counted(message: Message) -> None:
            nonlocal status, has_begun
            if message["type"] == "http.response.start":
                status, has_begun = message["status"], True
                message["headers"] = [*message["headers"], (b"x-request-id", record.id.encode())]
            await send(message)

        try:
            headers = Headers(scope=scope)
            self._admit(scope["path"], scope["method"], headers, record)
            await self._app(scope, self._limited(headers, receive), counted)
        except Exception as error:
            told = refusal(error)
            record.fields["code"] = told.code
            if told.status_code >= 500:
                record.failed(error)
            if not has_begun:
                await told.response()(scope, receive, counted)
        finally:
            self._watch.ended(record, record.fields.pop("status", status))

    def _route(self, path: str) -> str:
        if path.startswith("/v1/models/"):
            return "/v1/models/{model}"
        if path.startswith("/admin/adapters/"):
            return "/admin/adapters/{name}"
        return path if path in self._routes else "other"

    def _admit(self, path: str, method: str, headers: Mapping[str, str], record: Record) -> None:
        if not self._doorkeeper.asks_for_keys:
            _check_host(headers.get("host", ""))
        if path in OPEN_ROUTES:
            return
        admin = path == "/admin" or path.startswith("/admin/")
        entry = self._doorkeeper.admit(headers.get("authorization"), admin=admin)
        record.key = entry.name if entry else None
        if path in _ASKING and method == "POST":
            self._doorkeeper.count(entry)

    def _limited(self, headers: Mapping[str, str], receive: Receive) -> Receive:
        """Bodies up to the limit, whatever their header says."""
        declared = headers.get("content-length", "")
        if declared.isdecimal() and int(declared[:20]) > self._body_bytes:
            raise self._too_large()
        seen, is_whole, deadline_sec = 0, False, time.monotonic() + BODY_SEC

        async def limited() -> Message:
            nonlocal seen, is_whole
            if is_whole:
                return await receive()
            try:
                message = await asyncio.wait_for(receive(), deadline_sec - time.monotonic())
            except TimeoutError:
                headers = {"connection": "close"}
                raise ApiError(
                    408, "the request did not come to its end", headers=headers
                ) from None
            seen += len(message.get("body", b""))
            is_whole = not message.get("more_body", False)
            if seen > self._body_bytes:
                raise self._too_large()
            return message

        return limited

    def _too_large(self) -> ApiError:
        return ApiError(
            413,
            f"the request is larger than {self._body_bytes} bytes",
            code="request_too_large",
            # The rest of the body is not read.
            headers={"connection": "close"},
        )


def _check_host(host: str) -> None:
    """Without keys, a page of another site must not reach the server through a name of its own.

    Raises:
        ApiError: 403, for a name that is not this machine's.
    """
    name = host.rsplit(":", 1)[0] if not host.endswith("]") else host
    if name and not is_loopback(name.lower()):
        raise ApiError(403, f"requests without a key must come to localhost, not to {name[:100]!r}")
