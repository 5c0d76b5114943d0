"""Requests that are wrong in every way we know, and the status that each is to be told."""

import asyncio
import json
from collections.abc import Sequence
from dataclasses import dataclass

from bench.load.asks import error_problem

WAIT_SEC = 60.0
_JSON = b"content-type: application/json\r\n"


@dataclass(frozen=True)
class Wrong:
    """A wrong request.

    Attributes:
        name: What is wrong with it.
        sent: Its bytes.
        statuses: What it may be told.
    """

    name: str
    sent: bytes
    statuses: tuple[int, ...] = (400,)


def wrongs(key: str, user: str, body_bytes: int) -> Sequence[Wrong]:
    """All wrong requests.

    Args:
        key: A key that asks.
        user: The key of a user whose limit is used up quickly, or who may not administer.
        body_bytes: The server's limit.
    """
    found = [*_bodies(key), *_large(key, body_bytes), *_heads(key)]
    for authorization in ("", "Bearer", "Bearer wrong", f"Basic {key}", f"Bearer {key}x", "Ü"):
        name = f"key {authorization.replace(key, 'KEY')!r}"
        found.append(Wrong(name, _post("/v1/completions", b"{}", authorization), (401,)))
    admin = _post("/admin/adapters", b'{"name": "x", "path": "/"}', f"Bearer {user}")
    found.append(Wrong("no admin", admin, (403,)))
    return found


def _post(path: str, body: bytes, authorization: str, kind: bytes = _JSON) -> bytes:
    head = f"POST {path} HTTP/1.1\r\nhost: localhost\r\nauthorization: {authorization}\r\n"
    return head.encode("latin-1") + kind + b"content-length: %d\r\n\r\n" % len(body) + body


def _bodies(key: str) -> list[Wrong]:
    one, many = b'{"model": "host", "prompt": "a", ', b'{"model": "host", "messages": '
    completions = (
        *(b"", b"{", b"[]", b'"text"', b"null", b"\xff\xfe", b"[" * 9000, b'{"a":' * 3000, b"NaN"),
        *(b'{"model": "host"}', b'{"model": "host", "prompt": []}'),
        *(b'{"model": "host", "prompt": [[]]}', b'{"model": "host", "prompt": [1, "a"]}'),
        *(b'{"model": "host", "prompt": [99999999]}', b'{"model": "host", "prompt": "\\ud800"}'),
        *(
            one + b'"n": 99}',
            one + b'"n": 1e400}',
            one + b'"n": true}',
            one + b'"temperature": NaN}',
        ),
        *(one + b'"max_tokens": -1}', one + b'"max_tokens": 99999999999999999999999}'),
        *(one + b'"logit_bias": {"-1": 1}}', one + b'"logit_bias": {"99999999": 1}}'),
        *(one + b'"stop": [""]}', one + b'"colour": 1}', one + b'"suffix": "b"}'),
        *(one + b'"trimtab": {"strength": 1e99}}', one + b'"seed": 1' + b"0" * 400 + b"}"),
        b'{"model": "host", "prompt": "' + b"word " * 3000 + b'"}',
    )
    chats = (
        *(many + b"[]}", many + b'[{"role": "cook", "content": "a"}]}', many + b"5}"),
        *(many + b'[{"role": "user"}]}', many + b'[{"role": "user", "content": [{}]}]}'),
    )
    found = [("completions", body) for body in completions]
    found += [("chat/completions", body) for body in chats]
    said = f"Bearer {key}"
    return [
        Wrong(f"body {body[:60]!r}", _post(f"/v1/{route}", body, said)) for route, body in found
    ] + [
        Wrong(
            "no such model",
            _post("/v1/completions", one[:9] + b'"no", "prompt": "a"}', said),
            (404,),
        ),
        Wrong(
            "plain text",
            _post("/v1/completions", one[:-2] + b"}", said, b"content-type: text/plain\r\n"),
        ),
    ]


def _large(key: str, body_bytes: int) -> list[Wrong]:
    said, large = f"Bearer {key}", body_bytes + 1
    head = f"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\nauthorization: {said}\r\n".encode()
    chunk = b"1000\r\n" + b" " * 4096 + b"\r\n"
    chunked = head + _JSON + b"transfer-encoding: chunked\r\n\r\n"
    whole = json.dumps({"model": "host", "prompt": "a " * body_bytes}).encode()
    return [
        Wrong("declared too large", head + b"content-length: %d\r\n\r\n" % large, (413,)),
        Wrong("declared absurd", head + b"content-length: %s\r\n\r\n" % (b"9" * 19), (413,)),
        Wrong("too large", _post("/v1/completions", whole, said), (413,)),
        Wrong("too large in chunks", chunked + chunk * (body_bytes // 4096 + 2), (413,)),
        Wrong("broken chunk", chunked + b"zz\r\n"),
        Wrong("broken second chunk", chunked + chunk + b"-5\r\n"),
    ]


def _heads(key: str) -> list[Wrong]:
    said = f"authorization: Bearer {key}\r\nhost: localhost\r\n".encode()
    return [
        Wrong("no HTTP", b"GARBAGE\r\n\r\n"),
        Wrong("bytes", bytes(range(256)) + b"\r\n\r\n"),
        Wrong("TLS", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\0" * 50 + b"\r\n\r\n"),
        Wrong("no host", b"GET /v1/models HTTP/1.1\r\n\r\n"),
        Wrong("two lengths", b"POST / HTTP/1.1\r\n" + said + b"content-length: 1, 2\r\n\r\n"),
        Wrong("negative length", b"POST / HTTP/1.1\r\n" + said + b"content-length: -1\r\n\r\n"),
        Wrong("endless head", b"GET / HTTP/1.1\r\n" + said + b"x: " + b"y" * 100_000),
        Wrong("no such path", b"GET /v1/none HTTP/1.1\r\n" + said + b"\r\n", (404,)),
        Wrong("odd path", b"GET /%ff%00/..%2f HTTP/1.1\r\n" + said + b"\r\n", (404,)),
        Wrong("no such method", b"BREW /v1/models HTTP/1.1\r\n" + said + b"\r\n", (405,)),
        Wrong("wrong method", b"GET /v1/completions HTTP/1.1\r\n" + said + b"\r\n", (405,)),
        Wrong(
            "upgrade",
            b"GET /ws HTTP/1.1\r\nconnection: upgrade\r\nupgrade: websocket\r\n" + said + b"\r\n",
            (404,),
        ),
    ]


async def send_wrong(port: int, wrong: Wrong) -> tuple[int, str | None]:
    """Send a wrong request by itself.

    Returns:
        The status, 0 without one, and what is wrong with the answer.
    """
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        async with asyncio.timeout(WAIT_SEC):
            try:
                writer.write(wrong.sent)
                await writer.drain()
            except ConnectionError:
                # A server may hang up on a body that it does not want.
                pass
            status, body = await _response(reader)
    except (TimeoutError, ConnectionError, asyncio.IncompleteReadError, ValueError) as error:
        return 0, f"{wrong.name}: {type(error).__name__}: {error}"
    finally:
        writer.close()
    if status not in wrong.statuses:
        return status, f"{wrong.name}: told {status}, expected {wrong.statuses}: {body[:200]!r}"
    problem = error_problem(status, body)
    return status, problem and f"{wrong.name}: {problem}"


async def _response(reader: asyncio.StreamReader) -> tuple[int, bytes]:
    head = await reader.readuntil(b"\r\n\r\n")
    lines = head.decode("latin-1").split("\r\n")
    headers = dict(line.lower().split(": ", 1) for line in lines[1:] if ": " in line)
    return int(lines[0].split()[1]), await reader.readexactly(int(headers["content-length"]))
