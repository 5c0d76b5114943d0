"""The server over HTTP, asked by OpenAI's own client and by clients that mean no good."""

import asyncio
import io
import json
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest
from pydantic import ValidationError
from test_generate import HOST, PROMPTS, run
from test_generate import adapter as adapter  # a fixture
from test_generate import host as host  # a fixture
from test_imports import ENVIRONMENT
from test_serve_engine import served, wait_until

from trimtab.backends.hf import HFModel
from trimtab.cli import main
from trimtab.errors import InputError
from trimtab.serving import gate
from trimtab.serving import http as protocol
from trimtab.serving import reading as reading_module
from trimtab.serving.answers import Writer
from trimtab.serving.app import make_app
from trimtab.serving.doorkeeper import Doorkeeper
from trimtab.serving.keys import add_key, read_keys
from trimtab.serving.protocol import CompletionRequest
from trimtab.serving.refusals import ApiError, invalid
from trimtab.serving.run import KEEP_ALIVE_SEC, Running, check_listening, running
from trimtab.serving.work import Likely, Piece

PROMPT = PROMPTS[0]
GREEDY: dict[str, Any] = {"temperature": 0, "max_tokens": 8}


def http(method: str, url: str, **options: Any) -> httpx2.Response:
    return httpx2.request(method, url, timeout=300, **options)


@pytest.fixture(scope="module")
def log() -> io.StringIO:
    return io.StringIO()


@pytest.fixture(scope="module")
def server(host: HFModel, adapter: Path, log: io.StringIO) -> Iterator[Running]:
    config = served(f"sea={adapter}", f"ship={adapter}", body_bytes=20_000, slots=8)
    with running(config, host=host, log=log) as found:
        yield found


@pytest.fixture(scope="module")
def client(server: Running) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.base_url}/v1", api_key="none", max_retries=0) as client:
        yield client


def test_models_are_the_host_with_and_without_adapters(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["host", "host+sea", "host+ship"]
    assert client.models.retrieve("host+sea").owned_by == "trimtab"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")


@pytest.mark.parametrize("model", ["host", "host+sea"])
def test_a_completion_is_what_generate_says(
    client: openai.OpenAI, adapter: Path, model: str
) -> None:
    alone = run(adapter if "+" in model else None, PROMPT)
    found = client.completions.create(model=model, prompt=PROMPT, **GREEDY)
    assert found.choices[0].text == alone.texts[0]
    assert found.choices[0].finish_reason in ("length", "stop")
    assert found.usage and found.usage.completion_tokens == alone.tokens[0]
    assert found.usage.total_tokens == found.usage.prompt_tokens + alone.tokens[0]


def test_requests_in_preparation_are_bounded(
    client: openai.OpenAI, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trimtab.serving.service.MOST_IN_PREPARATION", 0)
    with pytest.raises(openai.RateLimitError) as refused:
        client.completions.create(model="host", prompt=PROMPT, **GREEDY)
    assert int(refused.value.response.headers["retry-after"]) >= 1
    monkeypatch.undo()
    assert client.completions.create(model="host", prompt=PROMPT, **GREEDY).choices[0].text


def test_prompts_of_every_kind(client: openai.OpenAI, host: HFModel) -> None:
    ids = host.context_ids() + host.encode(PROMPT)
    alone = run(None, PROMPT).texts[0]
    for prompt, answers in ((PROMPT, 1), (ids, 1), ([PROMPT, "The m"], 2), ([ids, ids], 2)):
        found = client.completions.create(model="host", prompt=prompt, n=2, **GREEDY)
        assert [choice.index for choice in found.choices] == list(range(2 * answers))
        assert found.choices[0].text == found.choices[1].text == alone


def test_strength_and_carriers_are_a_requests_own(client: openai.OpenAI, adapter: Path) -> None:
    def said(model: str, **options: object) -> str:
        extra = {"trimtab": options} if options else None
        found = client.completions.create(model=model, prompt=PROMPT, extra_body=extra, **GREEDY)
        return found.choices[0].text

    plain = said("host")
    assert said("host+sea:0") == plain == said("host+sea", strength=0)
    assert said("host+sea:0.5") == run(adapter, PROMPT, strength=0.5).texts[0]
    assert (
        said("host+sea", strength=0.5, carriers=["head"])
        == (run(adapter, PROMPT, strength=0.5, carriers=("head",)).texts[0])
    )
    assert said("host+sea:0.7+ship:0.3") != plain
    with pytest.raises(openai.BadRequestError, match="was asked for"):
        said("host+sea", carriers=["expert"])
    with pytest.raises(openai.BadRequestError, match="strength"):
        said("host+sea:7")


@pytest.mark.parametrize("model", ["host", "host+sea"])
def test_streams_say_the_same_as_whole_answers(client: openai.OpenAI, model: str) -> None:
    options: dict[str, Any] = {"temperature": 0.9, "seed": 3, "max_tokens": 20, "n": 2}
    options |= {"model": model, "stop": ["zq"], "logprobs": 2}
    whole = client.completions.create(prompt=PROMPT, **options)
    usage = {"include_usage": True}
    texts, tokens, finish = ["", ""], [[], []], ["", ""]
    chunks = list(
        client.completions.create(prompt=PROMPT, stream=True, stream_options=usage, **options)
    )
    for chunk in chunks[:-1]:
        (choice,) = chunk.choices
        texts[choice.index] += choice.text
        tokens[choice.index] += choice.logprobs.tokens if choice.logprobs else []
        finish[choice.index] = choice.finish_reason or finish[choice.index]
    assert texts == [choice.text for choice in whole.choices]
    assert finish == [choice.finish_reason for choice in whole.choices]
    assert tokens == [choice.logprobs.tokens for choice in whole.choices if choice.logprobs]
    assert chunks[-1].usage == whole.usage and not chunks[-1].choices


def test_chats_whole_and_streamed(client: openai.OpenAI, adapter: Path) -> None:
    messages: Any = [{"role": "user", "content": [{"type": "text", "text": PROMPT}]}]
    asked: dict[str, Any] = {"model": "host+sea", "messages": messages, "temperature": 0}
    asked |= {"max_completion_tokens": 8, "logprobs": True, "top_logprobs": 3}
    whole = client.chat.completions.create(**asked)
    said = whole.choices[0].message
    assert said.role == "assistant"
    assert said.content == run(adapter, PROMPT, chat=True).texts[0]
    told = whole.choices[0].logprobs
    assert told and told.content and len(told.content) == 8
    for token in told.content:
        assert token.top_logprobs[0].logprob == max(t.logprob for t in token.top_logprobs)
        assert token.logprob == token.top_logprobs[0].logprob <= 0 and token.bytes
    chunks = list(client.chat.completions.create(stream=True, **asked))
    deltas = [chunk.choices[0].delta for chunk in chunks]
    assert deltas[0].role == "assistant"
    assert "".join(delta.content or "" for delta in deltas) == said.content
    assert chunks[-1].choices[0].finish_reason == whole.choices[0].finish_reason
    longer = [{"role": "system", "content": "Sail."}, *messages]
    longer += [{"role": "assistant", "content": "Aye."}, {"role": "user", "content": "Where?"}]
    assert client.chat.completions.create(**(asked | {"messages": longer})).choices[0].message


@pytest.mark.parametrize("model", ["host+sea", "host+sea:0.7+ship:0.3"])
def test_what_holds_no_evidence_is_answered_by_the_prior(client: openai.OpenAI, model: str) -> None:
    silent: Any = [{"role": "assistant", "content": PROMPT}, {"role": "user", "content": ""}]
    asked: dict[str, Any] = {"model": model, "temperature": 0}
    assert client.chat.completions.create(messages=silent, max_tokens=4, **asked).choices
    echo: dict[str, Any] = {"echo": True, "logprobs": 1, "max_tokens": 1}
    assert client.completions.create(prompt=[5], **echo, **asked).choices[0].logprobs


@pytest.mark.parametrize("model", ["host", "host+sea"])
def test_an_echo_tells_how_likely_the_prompt_was(
    client: openai.OpenAI, host: HFModel, model: str
) -> None:
    asked: dict[str, Any] = {"model": model, "echo": True, "logprobs": 1, "temperature": 0}
    found = client.completions.create(prompt=PROMPT, max_tokens=2, **asked).choices[0]
    told = found.logprobs
    assert found.text.startswith(PROMPT) and told and told.tokens and told.token_logprobs
    shown = len(host.encode(PROMPT))
    assert "".join(told.tokens[:shown]) == PROMPT and len(told.tokens) == shown + 2
    assert told.text_offset and told.text_offset[shown] == len(PROMPT)
    assert all(p is None or p <= 0 for p in told.token_logprobs)
    alone = client.completions.create(prompt=PROMPT, max_tokens=0, **asked).choices[0]
    assert alone.text == PROMPT and alone.finish_reason == "length"
    assert alone.logprobs and alone.logprobs.token_logprobs == told.token_logprobs[:shown]


def test_the_end_token_is_told_where_a_completion_tells_logprobs(
    client: openai.OpenAI, host: HFModel
) -> None:
    end = min(host.end_ids)
    asked: dict[str, Any] = {"model": "host", "prompt": PROMPT, "logit_bias": {str(end): 100}}
    asked |= {"echo": True, "logprobs": 1, "max_tokens": 1}
    found = client.completions.create(**asked)
    (choice,) = found.choices
    assert choice.text == PROMPT and choice.finish_reason == "stop"
    assert found.usage and found.usage.completion_tokens == 0
    told = choice.logprobs
    assert told and told.tokens and told.token_logprobs and told.text_offset
    assert len(told.tokens) == len(told.token_logprobs) == len(host.encode(PROMPT)) + 1
    assert told.tokens[-1] == host.tokenizer.convert_ids_to_tokens(end)
    assert told.text_offset[-1] == len(PROMPT)
    (chunk,) = [one for one in client.completions.create(stream=True, **asked) if one.choices][1:]
    assert chunk.choices[0].logprobs and chunk.choices[0].logprobs.tokens == told.tokens[-1:]


def test_a_bias_bans_and_forces_tokens(client: openai.OpenAI, host: HFModel) -> None:
    (token,) = host.encode("q")
    asked: dict[str, Any] = {"model": "host+sea", "prompt": PROMPT, **GREEDY}
    found = client.completions.create(logit_bias={str(token): 100}, **asked)
    assert found.choices[0].text == "q" * 8


def test_asynchronous_clients_share_passes(server: Running, adapter: Path) -> None:
    async def all_at_once() -> list[str]:
        base_url = f"{server.base_url}/v1"
        async with openai.AsyncOpenAI(base_url=base_url, api_key="x", max_retries=0) as client:

            async def one(number: int) -> str:
                model = "host+sea" if number % 2 else "host"
                if number % 3:
                    asked = client.completions.create(model=model, prompt=PROMPT, **GREEDY)
                    return (await asked).choices[0].text
                stream = await client.completions.create(
                    model=model, prompt=PROMPT, stream=True, **GREEDY
                )
                return "".join([chunk.choices[0].text async for chunk in stream])

            return await asyncio.gather(*(one(number) for number in range(12)))

    texts = asyncio.run(all_at_once())
    expected = run(None, PROMPT).texts[0], run(adapter, PROMPT).texts[0]
    assert texts == [expected[number % 2] for number in range(12)]


BAD: list[tuple[str, bytes]] = [
    ("completions", b""),
    ("completions", b"{"),
    ("completions", b"[]"),
    ("completions", b'"text"'),
    ("completions", b"\xff\xfe"),
    ("completions", b"[" * 5000),
    ("completions", b'{"model": "host"}'),
    ("completions", b'{"model": "host", "prompt": ""}'),
    ("completions", b'{"model": "host", "prompt": []}'),
    ("completions", b'{"model": "host", "prompt": [[]]}'),
    ("completions", b'{"model": "host", "prompt": ["a", 5]}'),
    ("completions", b'{"model": "host", "prompt": [999999]}'),
    ("completions", b'{"model": "host", "prompt": [-1]}'),
    ("completions", b'{"model": "host", "prompt": "\\ud800"}'),
    ("completions", b'{"model": "\\ud800", "prompt": "a"}'),
    ("completions", b'{"model": 5, "prompt": "a"}'),
    ("completions", b'{"model": "host", "prompt": "a", "n": 99}'),
    ("completions", b'{"model": "host", "prompt": "a", "n": true}'),
    ("completions", b'{"model": "host", "prompt": "a", "temperature": NaN}'),
    ("completions", b'{"model": "host", "prompt": "a", "temperature": 1e999}'),
    ("completions", b'{"model": "host", "prompt": "a", "top_p": 0}'),
    ("completions", b'{"model": "host", "prompt": "a", "max_tokens": -1}'),
    ("completions", b'{"model": "host", "prompt": "a", "max_tokens": 0}'),
    ("completions", b'{"model": "host", "prompt": "a", "stop": ""}'),
    ("completions", b'{"model": "host", "prompt": "a", "stop": [""]}'),
    ("completions", b'{"model": "host", "prompt": "a", "stop": ["\\ud800"], "colour": 1}'),
    ("completions", b'{"model": "host", "prompt": "a", "logit_bias": {"x": 1}}'),
    ("completions", b'{"model": "host", "prompt": "a", "logit_bias": {"999999": 1}}'),
    ("completions", b'{"model": "host", "prompt": "a", "logit_bias": {"1": NaN}}'),
    ("completions", b'{"model": "host", "prompt": "a", "logprobs": 21}'),
    ("completions", b'{"model": "host", "prompt": "a", "best_of": 4}'),
    ("completions", b'{"model": "host", "prompt": "a", "suffix": "b"}'),
    ("completions", b'{"model": "host", "prompt": "a", "seed": 9223372036854775808}'),
    ("completions", b'{"model": "host", "prompt": "a", "trimtab": {"carriers": ["hat"]}}'),
    ("completions", b'{"model": "host", "prompt": "a", "trimtab": {"strength": 3}}'),
    ("completions", b'{"model": "host", "prompt": "' + b"word " * 3000 + b'"}'),
    ("chat/completions", b'{"model": "host", "messages": []}'),
    ("chat/completions", b'{"model": "host", "messages": [{"role": "cook", "content": "a"}]}'),
    ("chat/completions", b'{"model": "host", "messages": [{"role": "system", "content": "a"}]}'),
    ("chat/completions", b'{"model": "host", "messages": [{"role": "user", "content": 5}]}'),
    ("chat/completions", b'{"model": "host", "messages": [{"role": "user"}]}'),
    ("chat/completions", b'{"model": "host", "messages": "a", "tools": [{}]}'),
]


@pytest.mark.parametrize(("route", "body"), BAD)
def test_what_is_wrong_is_told_in_openais_shape(server: Running, route: str, body: bytes) -> None:
    headers = {"content-type": "application/json"}
    found = http("POST", f"{server.base_url}/v1/{route}", content=body, headers=headers)
    assert 400 <= found.status_code < 500, found.text
    error = found.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error" and error["message"]
    assert "Traceback" not in found.text and "trimtab/" not in found.text


WORDS: list[tuple[str, dict[str, Any], str, str | None]] = [
    ("completions", {"prompt": []}, "prompt: expected a text, a list of token", "prompt"),
    ("completions", {"prompt": [-1]}, "prompt: expected a text, a list of token", "prompt"),
    ("completions", {"stop": ""}, "stop: expected a text of 1 to", "stop"),
    ("completions", {"stop": ["a"] * 17}, "stop: at most 16 strings", "stop"),
    ("completions", {"suffix": "b"}, "suffix is not supported", "suffix"),
    ("completions", {"colour": 1}, "colour is not supported", "colour"),
    ("completions", {"model": "host+no"}, "no adapter 'no' is loaded (GET /v1/models", "model"),
    ("chat/completions", {"tools": [{}]}, "tools is not supported", "tools"),
    (
        "chat/completions",
        {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
        "messages.0.content: expected a text, or a list of parts",
        "messages.0.content",
    ),
]


@pytest.mark.parametrize(("route", "wrong", "words", "param"), WORDS)
def test_a_refusal_says_what_was_expected(
    server: Running, route: str, wrong: dict[str, Any], words: str, param: str | None
) -> None:
    chat = {"messages": [{"role": "user", "content": "a"}]}
    body = {"model": "host", **(chat if "chat" in route else {"prompt": "a"}), **wrong}
    error = http("POST", f"{server.base_url}/v1/{route}", json=body).json()["error"]
    assert words in error["message"] and error["param"] == param


def test_a_host_without_a_chat_template_says_where_to_ask(
    server: Running, host: HFModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host.tokenizer, "chat_template", None)
    body = {"model": "host+sea", "messages": [{"role": "user", "content": "a"}]}
    found = http("POST", f"{server.base_url}/v1/chat/completions", json=body)
    error = found.json()["error"]
    assert found.status_code == 400 and error["code"] == "no_chat_template"
    # The server's own name for the host, not where it lies on its disk.
    assert error["message"].startswith("host has no chat template: ask /v1/completions")


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/v1/none", 404),
        ("GET", "/v1/completions", 405),
        ("DELETE", "/v1/models", 405),
        ("GET", "/admin/adapters", 403),
        ("POST", "/admin/adapters", 403),
        ("GET", "/%ff%00", 404),
    ],
)
def test_wrong_paths_are_json_too(server: Running, method: str, path: str, status: int) -> None:
    found = http(method, f"{server.base_url}{path}")
    assert found.status_code == status and found.json()["error"]["message"]


def test_other_content_types_ask_for_nothing(server: Running) -> None:
    body = json.dumps({"model": "host", "prompt": "a"})
    headers = {"content-type": "text/plain"}
    found = http("POST", f"{server.base_url}/v1/completions", content=body, headers=headers)
    assert found.status_code == 400 and "Content-Type" in found.json()["error"]["message"]
    other = {"host": "evil.example", "content-type": "application/json"}
    found = http("POST", f"{server.base_url}/v1/completions", content=body, headers=other)
    assert found.status_code == 403


def test_large_bodies_are_cut_off(server: Running) -> None:
    url = f"{server.base_url}/v1/completions"
    assert http("POST", url, content=b"x" * 20_001).status_code == 413

    def parts() -> Iterator[bytes]:
        for _ in range(30):
            yield b" " * 1000

    found = http("POST", url, content=parts(), headers={"content-type": "application/json"})
    assert found.status_code == 413 and found.json()["error"]["code"] == "request_too_large"


def test_a_body_that_does_not_come_is_not_waited_for(
    server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gate, "BODY_SEC", 0.05)
    address, port = server.base_url.removeprefix("http://").split(":")
    with socket.create_connection((address, int(port))) as raw:
        head = b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: 9\r\n\r\n{"
        raw.sendall(head)
        raw.settimeout(300)
        assert b" 408 " in raw.recv(1000)


def raw_answers(server: Running, *parts: bytes) -> list[bytes]:
    """What the server says to each part, up to the end of a JSON object or of the connection."""
    address, port = server.base_url.removeprefix("http://").split(":")
    with socket.create_connection((address, int(port)), timeout=300) as raw:
        answers = []
        for part in parts:
            raw.sendall(part)
            said = b""
            while not said.endswith(b"}") and (more := raw.recv(65536)):
                said += more
            answers.append(said)
    return answers


def told(answer: bytes) -> dict[str, Any]:
    """The JSON of an answer."""
    head, _, body = answer.partition(b"\r\n\r\n")
    assert b"application/json" in head
    return json.loads(body)


POST = b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\n"


@pytest.mark.parametrize(
    "sent",
    [
        b"GARBAGE\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\r\n\r\n",
        b"GET /v1/models HTTP/1.1\r\n\r\n",
        b"GET / HTTP/1.1\r\nhost: localhost\r\nx: " + b"y" * 100_000,
        POST + b"content-length: -1\r\n\r\n",
        POST + b"transfer-encoding: chunked\r\n\r\nzz\r\n",
    ],
)
def test_what_is_no_http_is_told_and_logged_as_json(
    server: Running, log: io.StringIO, sent: bytes
) -> None:
    before = log.getvalue().count('"event": "http"')
    (answer,) = raw_answers(server, sent)
    assert answer.startswith(b"HTTP/1.1 400 ") and told(answer)["error"]["code"] == "invalid_http"
    assert log.getvalue().count('"event": "http"') == before + 1


def test_what_is_no_http_after_an_answer_is_not_answered_again(
    server: Running, caplog: pytest.LogCaptureFixture
) -> None:
    # The path is refused before the body comes, and the body turns out to be none.
    head = b"POST /v1/none HTTP/1.1\r\nhost: localhost\r\ntransfer-encoding: chunked\r\n\r\n"
    first, second = raw_answers(server, head, b"zz\r\n")
    assert first.startswith(b"HTTP/1.1 404 ") and second == b""
    assert not [record for record in caplog.records if record.name == "asyncio"]


def test_a_head_that_does_not_come_is_not_waited_for(
    server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(protocol, "HEAD_SEC", 0.05)
    # The wait begins with the connection, and anew after each answer.
    asked = b"GET /health HTTP/1.1\r\nhost: localhost\r\n\r\n"
    for parts in ((b"",), (b"GET / HTTP/1.1\r\nhost: loc",), (asked, b"GET / HT")):
        last = raw_answers(server, *parts)[-1]
        assert last.startswith(b"HTTP/1.1 408 ") and told(last)["error"]["code"] == "timeout"


def test_idle_connections_outlive_those_that_clients_keep() -> None:
    kept_sec = httpx2.Limits().keepalive_expiry
    assert kept_sec and KEEP_ALIVE_SEC >= 2 * kept_sec


@contextmanager
def asking_raw(server: Running, body: dict[str, object]) -> Iterator[socket.socket]:
    """A connection that has asked, and reads nothing."""
    text = json.dumps(body).encode()
    address, port = server.base_url.removeprefix("http://").split(":")
    with socket.create_connection((address, int(port))) as raw:
        head = f"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: {len(text)}"
        raw.sendall(head.encode() + b"\r\ncontent-type: application/json\r\n\r\n" + text)
        yield raw


def test_who_hangs_up_frees_the_slot(server: Running, log: io.StringIO) -> None:
    engine = server.service.engine
    for stream in (True, False):
        body = {"model": "host", "prompt": "The m", "max_tokens": 1900, "stream": stream}
        with asking_raw(server, body | {"logit_bias": {"257": -100}}):
            wait_until(lambda: bool(engine.running))
        wait_until(lambda: not engine.running)
    wait_until(lambda: log.getvalue().count('"status": 499') >= 2)


def test_who_does_not_read_holds_up_nobody(server: Running, client: openai.OpenAI) -> None:
    engine = server.service.engine
    body = {"model": "host", "prompt": "The m", "max_tokens": 60, "stream": True}
    text = json.dumps(body | {"logit_bias": {"257": -100}}).encode()
    incoming = [{"type": "http.request", "body": text, "more_body": False}]
    headers = [(b"content-type", b"application/json"), (b"host", b"localhost")]
    scope = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": headers}
    scope |= {"query_string": b"", "http_version": "1.1", "root_path": "", "scheme": "http"}

    async def ask_and_never_read() -> None:
        stuck, never = asyncio.Event(), asyncio.Event()

        async def receive() -> Any:
            if not incoming:
                await never.wait()
            return incoming.pop()

        async def send(message: Any) -> None:
            if message["type"] == "http.response.body":
                stuck.set()
                await never.wait()

        task = asyncio.create_task(make_app(server.service)(scope, receive, send))
        await stuck.wait()
        asked = {"model": "host", "prompt": PROMPT, **GREEDY}
        found = await asyncio.to_thread(lambda: client.completions.create(**asked))
        assert found.choices[0].text == run(None, PROMPT).texts[0]
        # All is written, and the slot is free.
        await asyncio.to_thread(wait_until, lambda: not engine.running)
        assert not task.done()
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task

    asyncio.run(ask_and_never_read())


@pytest.mark.parametrize("stream", [True, False])
def test_time_is_limited(host: HFModel, stream: bool) -> None:
    with running(served(time_limit_sec=1e-6), host=host) as server:
        body = {"model": "host", "prompt": PROMPT, "stream": stream, "max_tokens": 1000}
        found = http("POST", f"{server.base_url}/v1/completions", json=body)
        assert found.status_code == 504 and found.json()["error"]["code"] == "timeout"
        assert found.headers["x-should-retry"] == "false"


def test_metrics_health_and_the_log(server: Running, log: io.StringIO, client: Any) -> None:
    secret = "The secret keel"
    client.completions.create(model="host+sea:0.25", prompt=secret, **GREEDY)
    assert http("GET", f"{server.base_url}/health").json() == {"status": "ok"}
    assert http("GET", f"{server.base_url}/ready").json() == {"ready": True}
    text = http("GET", f"{server.base_url}/metrics").text
    assert 'trimtab_requests_total{route="/v1/completions",status="200"}' in text
    assert 'trimtab_completion_tokens_total{model="host+sea"}' in text
    assert "trimtab_running 0.0" in text and "trimtab_first_text_seconds_bucket" in text
    lines = [json.loads(line) for line in log.getvalue().splitlines()]
    asked = [line for line in lines if line.get("model") == "host+sea"]
    assert asked[-1]["completion_tokens"] > 0 and asked[-1]["status"] == 200
    body = {"model": "host", "prompt": secret, secret: 1}
    name = http("POST", f"{server.base_url}/v1/completions", json=body).headers["x-request-id"]
    wait_until(lambda: name in log.getvalue())
    refused = json.loads(next(line for line in log.getvalue().splitlines() if name in line))
    assert (refused["status"], refused["code"]) == (400, "invalid_value")
    assert secret not in log.getvalue()


@pytest.mark.parametrize("stream", [True, False])
def test_the_log_says_what_went_wrong_in_the_server_and_the_answer_does_not(
    server: Running, log: io.StringIO, stream: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise ValueError("a broken rudder")

    monkeypatch.setattr(reading_module, "echoing", broken)
    body = {"model": "host", "prompt": PROMPT, "echo": True, "stream": stream}
    found = http("POST", f"{server.base_url}/v1/completions", json=body)
    assert found.status_code == 500 and found.json()["error"]["type"] == "server_error"
    assert "rudder" not in found.text
    name = found.headers["x-request-id"]
    wait_until(lambda: name in log.getvalue())
    (line,) = [line for line in map(json.loads, log.getvalue().splitlines()) if name in str(line)]
    assert line["status"] == 500 and line["error"] == "ValueError: a broken rudder"


def test_the_document_of_the_interface(server: Running) -> None:
    paths = http("GET", f"{server.base_url}/openapi.json").json()["paths"]
    assert {"/v1/models", "/v1/completions", "/v1/chat/completions"} <= set(paths)
    for operations in paths.values():
        for operation in operations.values():
            # Errors are of our shape, not of FastAPI's; without keys no route asks for one.
            assert set(operation["responses"]) == {"200", "4XX", "5XX"}
            assert set(operation["responses"]["4XX"]["content"]) == {"application/json"}
            assert "security" not in operation
    streamed = paths["/v1/completions"]["post"]["responses"]["200"]["content"]
    assert set(streamed) == {"application/json", "text/event-stream"}
    assert set(paths["/metrics"]["get"]["responses"]["200"]["content"]) == {"text/plain"}


def test_the_document_says_which_routes_need_a_key(host: HFModel, tmp_path: Path) -> None:
    add_key(tmp_path / "keys.json", "user")
    with running(served(keys=tmp_path / "keys.json"), host=host) as server:
        document = http("GET", f"{server.base_url}/openapi.json").json()
        keyless = {
            path
            for path, operations in document["paths"].items()
            if all("security" not in operation for operation in operations.values())
        }
        assert keyless == {"/health", "/ready"}
        for path in keyless:
            assert http("GET", f"{server.base_url}{path}").status_code == 200
        for path in set(document["paths"]) - keyless:
            assert http("GET", f"{server.base_url}{path}").status_code == 401


# Keys, limits and the adapters at run time.


def test_keys_are_kept_as_hashes_and_can_be_taken_away(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    one, two = add_key(path, "one"), add_key(path, "two", admin=True)
    assert one not in path.read_text() and two not in path.read_text()
    assert path.stat().st_mode & 0o777 == 0o600
    with pytest.raises(InputError, match="already"):
        add_key(path, "one")
    complaints: list[str] = []
    door = Doorkeeper(path, None, complain=complaints.append)
    entry = door.admit(f"Bearer {one}")
    assert entry and entry.name == "one"
    for wrong in (None, "", "Bearer", f"Basic {one}", f"Bearer {one}x", f"Bearer {two[:-1]}"):
        with pytest.raises(ApiError) as error:
            door.admit(wrong)
        assert error.value.status_code == 401
    with pytest.raises(ApiError) as error:
        door.admit(f"Bearer {one}", admin=True)
    assert error.value.status_code == 403 and door.admit(f"Bearer {two}", admin=True)
    content = json.loads(path.read_text())
    content["keys"] = [key for key in content["keys"] if key["name"] == "two"]
    path.write_text(json.dumps(content) + " ")
    with pytest.raises(ApiError):
        door.admit(f"Bearer {one}")
    assert door.admit(f"Bearer {two}") == read_keys(path)[0]
    path.write_text("{")
    for _ in range(2):
        with pytest.raises(ApiError):
            door.admit(f"Bearer {two}")
    # Once, and again when it has been whole in between.
    assert len(complaints) == 1 and "not valid JSON" in complaints[0]
    path.write_text(json.dumps(content))
    assert door.admit(f"Bearer {two}")
    path.unlink()
    with pytest.raises(ApiError):
        door.admit(f"Bearer {two}")
    assert len(complaints) == 2 and "No such file" in complaints[1]
    with pytest.raises(InputError):
        Doorkeeper(path, None)


def test_a_limit_fills_evenly(tmp_path: Path) -> None:
    path, now_sec = tmp_path / "keys.json", [0.0]
    add_key(path, "slow", requests_per_minute=2)
    door = Doorkeeper(path, 600, clock=lambda: now_sec[0])
    (entry,) = read_keys(path)
    door.count(entry)
    door.count(entry)
    with pytest.raises(ApiError) as error:
        door.count(entry)
    assert error.value.status_code == 429
    wait_sec = int((error.value.headers or {})["retry-after"])
    assert 30 <= wait_sec <= 31
    now_sec[0] += wait_sec
    door.count(entry)


def test_others_are_not_let_in_without_keys(capsys: pytest.CaptureFixture[str]) -> None:
    for address in ("127.0.0.1", "::1", "localhost", "127.9.9.9"):
        check_listening(served(address=address))
    for address in ("0.0.0.0", "::", "192.168.1.5", "example.org", ""):
        with pytest.raises(InputError, match="no API keys"):
            check_listening(served(address=address))
    with pytest.raises(SystemExit) as end:
        main(["serve", HOST, "--address", "0.0.0.0"])
    assert end.value.code == 2 and "trimtab key NAME" in capsys.readouterr().err


def test_what_cannot_be_served_is_told_before_the_host_is_opened(
    tmp_path: Path, adapter: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "keys.json").write_text("{")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        for words, told in (
            (["--port", str(port)], f"cannot listen on 127.0.0.1 port {port}"),
            (["--adapter", f"sea={tmp_path}"], "adapter"),
            (["--adapter", f"a+b={adapter}"], "'a+b' cannot be the name"),
            (["--adapter", f"a={adapter}", "--adapter", f"a={adapter}"], "two are called a"),
            (["--keys", str(tmp_path / "keys.json")], "not valid JSON"),
        ):
            with pytest.raises(SystemExit) as end:
                main(["serve", str(tmp_path / "no-host"), *words])
            said = " ".join(capsys.readouterr().err.split())
            assert end.value.code == 2 and told in said and "no-host" not in said


def test_adapters_come_and_go_without_dropping_requests(
    host: HFModel, adapter: Path, tmp_path: Path
) -> None:
    path = tmp_path / "keys.json"
    key, boss = add_key(path, "user"), add_key(path, "boss", admin=True)
    config = served(keys=path, requests_per_minute=3)
    with running(config, host=host) as server:
        url = f"{server.base_url}/admin/adapters"
        headers = {"authorization": f"Bearer {boss}"}
        with pytest.raises(openai.AuthenticationError):
            openai.OpenAI(base_url=f"{server.base_url}/v1", api_key="no").models.list()
        assert http("GET", f"{server.base_url}/metrics").status_code == 401
        assert http("GET", f"{server.base_url}/health").status_code == 200
        wanted = {"name": "sea", "path": str(adapter)}
        for wrong, status in ((None, 401), ({"authorization": f"Bearer {key}"}, 403)):
            assert http("POST", url, json=wanted, headers=wrong).status_code == status
        base_url = f"{server.base_url}/v1"
        with openai.OpenAI(base_url=base_url, api_key=key, max_retries=0) as client:
            with pytest.raises(openai.NotFoundError):
                client.completions.create(model="host+sea", prompt=PROMPT, **GREEDY)
            found = http("POST", url, json=wanted, headers=headers)
            assert found.json()["carriers"] == ["head", "memory"] and found.json()["contains_text"]
            asked: dict[str, Any] = {"model": "host+sea", "prompt": PROMPT, "temperature": 0}
            ban = {"257": -100}
            stream = client.completions.create(max_tokens=120, stream=True, logit_bias=ban, **asked)
            text = next(iter(stream)).choices[0].text
            assert http("DELETE", f"{url}/sea", headers=headers).json()["deleted"]
            assert http("GET", url, headers=headers).json() == {"data": []}
            assert http("DELETE", f"{url}/sea", headers=headers).status_code == 404
            with pytest.raises(openai.NotFoundError):
                client.completions.create(max_tokens=1, **asked)
            chunks = list(stream)
            text += "".join(chunk.choices[0].text for chunk in chunks)
            assert chunks[-1].choices[0].finish_reason == "length" and len(text) > 100
            with pytest.raises(openai.RateLimitError) as error:
                client.completions.create(max_tokens=1, **asked)
            assert int(error.value.response.headers["retry-after"]) >= 1
        bad = http("POST", url, json={"name": "x", "path": str(tmp_path)}, headers=headers)
        assert bad.status_code == 400 and bad.json()["error"]["message"]


def test_what_is_in_flight_ends_before_the_server_does(host: HFModel) -> None:
    texts: list[str] = []
    with running(served(), host=host) as server:
        client = openai.OpenAI(base_url=f"{server.base_url}/v1", api_key="x", max_retries=0)
        stream = client.completions.create(
            model="host", prompt=PROMPT, stream=True, max_tokens=100, logit_bias={"257": -100}
        )
        texts.append(next(iter(stream)).choices[0].text)
        server.service.is_closing = True
        assert http("GET", f"{server.base_url}/ready").status_code == 503
        server.stop()
        texts += [chunk.choices[0].text for chunk in stream]
        client.close()
    assert len("".join(texts)) > 50


def test_who_is_not_waited_for_any_longer_is_told(host: HFModel, log: io.StringIO) -> None:
    config = served(slots=1, shutdown_sec=0.5, context_tokens=4000)
    body = {"model": "host", "prompt": PROMPT, "max_tokens": 3900, "logit_bias": {"257": -100}}
    statuses: list[int] = []

    def queue_up(url: str) -> None:
        found = http("POST", url, json=body)
        assert found.json()["error"]["code"] == "shutting_down"
        statuses.append(found.status_code)

    with running(config, host=host, log=log) as server:
        url = f"{server.base_url}/v1/completions"
        with httpx2.stream("POST", url, json={**body, "stream": True}, timeout=300) as stream:
            lines = stream.iter_lines()
            assert next(lines).startswith("data: {")
            waiting = threading.Thread(target=queue_up, args=(url,))
            waiting.start()
            wait_until(lambda: server.service.engine.waiting == 1)
            server.stop()
            *_, last = (line for line in lines if line)
        assert json.loads(last.removeprefix("data: "))["error"]["code"] == "shutting_down"
        waiting.join()
        name = stream.headers["x-request-id"]
        wait_until(lambda: name in log.getvalue())
    assert statuses == [503]
    # The response began with 200, which is not how it ended.
    told = json.loads(next(line for line in log.getvalue().splitlines() if name in line))
    assert (told["status"], told["code"], told["error"]) == (503, "shutting_down", "Closing")


def test_the_command_serves_until_it_is_asked_to_end(tmp_path: Path) -> None:
    words = [sys.executable, "-m", "trimtab", "serve", "tiny:llama", "--port", "0"]
    with subprocess.Popen(words, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT) as process:
        try:
            assert process.stderr
            listening = json.loads(process.stderr.readline())
            assert listening["event"] == "listening" and listening["models"] == ["tiny:llama"]
            body = {"model": "tiny:llama", "prompt": "The", "max_tokens": 3}
            url = f"{listening['address']}/v1/completions"
            found = http("POST", url, json=body)
            assert found.json()["usage"]["prompt_tokens"] == 3
            process.send_signal(signal.SIGTERM)
            lines = [json.loads(line) for line in process.stderr]
            assert [line["event"] for line in lines] == ["request", "stopped"]
            assert process.wait() == 0
        finally:
            process.kill()


def test_prompts_and_answers_are_logged_where_that_is_asked_for(
    host: HFModel, adapter: Path
) -> None:
    log, body = io.StringIO(), {"model": "host", "prompt": PROMPT, "n": 2, **GREEDY}
    with running(served(f"sea={adapter}", log_prompts=True), host=host, log=log) as found:
        url = f"{found.base_url}/v1/completions"
        whole = http("POST", url, json=body).json()
        assert http("POST", url, json=body | {"stream": True}).text.endswith("data: [DONE]\n\n")
        wait_until(lambda: log.getvalue().count('"answers"') == 2)
    lines = [json.loads(line) for line in log.getvalue().splitlines() if '"answers"' in line]
    texts = [choice["text"] for choice in whole["choices"]]
    assert [line["answers"] for line in lines] == [texts, texts]
    assert all(line["request"]["prompt"] == PROMPT for line in lines)


@pytest.mark.parametrize(
    ("body", "told"),
    [
        (
            {"prompt": "a", "temperature": 3},
            "temperature: .*less than or equal to 2.* [(]found 3[)]",
        ),
        ({"prompt": "a", "max_tokens": "many"}, 'max_tokens: .*valid integer [(]found "many"[)]'),
        ({"prompt": "a", "stop": ["x" * 2000]}, "stop: expected a text of 1 to 1,024 characters"),
        ({"prompt": "a", "trimtab": {"strength": True}}, "trimtab.strength: .*[(]found true[)]"),
        ({"prompt": "a", "seed": 10**90}, r"seed: [^(]*$"),
    ],
)
def test_what_is_wrong_with_a_request_is_said_with_what_was_found(
    body: dict[str, Any], told: str
) -> None:
    with pytest.raises(ValidationError) as error:
        CompletionRequest.model_validate({"model": "host", **body})
    refused = invalid(error.value.errors())
    assert refused.status_code == 400 and refused.param
    assert re.search(told, str(refused.detail)), refused.detail


def test_bodies_that_cannot_be_read_are_told_so(server: Running) -> None:
    headers = {"content-type": "application/json"}
    for content, told in (
        (b'{"model": "host", "prompt": }', "not valid JSON: at character 28, Expecting value"),
        (b'{"model": "\xff"}', "send JSON in UTF-8"),
        (b'{"model": ' + b"9" * 5000 + b"}", "without huge numbers"),
    ):
        url = f"{server.base_url}/v1/completions"
        answer = httpx2.post(url, content=content, headers=headers)
        error = answer.json()["error"]
        assert answer.status_code == 400 and error["code"] == "invalid_json"
        assert told in error["message"], error


def test_long_texts_are_refused_before_a_tokenizer_reads_them(host: HFModel) -> None:
    config = served(context_tokens=64, body_bytes=10_000_000)
    with running(config, host=host) as server:
        longest = max(len(text or b"") for text in host.vocabulary.token_bytes)
        for size, told in ((64 * longest + 1, "bytes at most"), (65 * 4, None)):
            body = {"model": "host", "prompt": "z" * size, "max_tokens": 1}
            answer = httpx2.post(f"{server.base_url}/v1/completions", json=body)
            error = answer.json().get("error")
            assert error is None or error["code"] == "context_length_exceeded"
            assert told is None or told in error["message"]


def test_a_character_that_tokens_share_counts_where_it_is_complete(host: HFModel) -> None:
    ids = host.encode("é x")
    split = [i for i in range(len(host.vocabulary)) if host.vocabulary.token_bytes[i] == b"\xc3"]
    rest = [i for i in range(len(host.vocabulary)) if host.vocabulary.token_bytes[i] == b"\xa9"]
    assert split and rest
    tokens = [Likely(i, -1.0) for i in (split[0], rest[0], ids[-1])]
    writer = Writer(host, "host", chat=False, has_logprobs=True)
    # In two pieces, as a stream has it.
    first, second = Piece(0, "", tuple(tokens[:1])), Piece(0, "é x", tuple(tokens[1:]))
    chunks = [
        *writer.chunks(first, usage_follows=False),
        *writer.chunks(second, usage_follows=False),
    ]
    offsets = [chunk["choices"][0]["logprobs"]["text_offset"] for chunk in chunks]
    assert offsets == [[0], [0, 1]]
