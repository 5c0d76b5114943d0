"""A real model behind HTTP, in the manner of hosted APIs, with faults where a test wants them."""

import json
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import torch

from trimtab.backends.chat import prompt_ids
from trimtab.backends.hf import HFModel
from trimtab.hosted.ledger import Usage

PATIENCE_SEC = 30.0
"""Longest time that a slow answer waits for the client to lose its patience and ask again."""

LACKING = ("no-logprobs", "no-top")
"""Faults of answers that are whole and can be counted."""


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where answers are kept, empty; no key is known."""
    for name in ("TRIMTAB_API_KEY", "OPENAI_API_KEY", "ANTHROPIC_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TRIMTAB_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@dataclass
class Endpoint:
    """A model, what of it is shown, and what happened.

    Attributes:
        model: The model.
        top: Log-probabilities shown at most; None for all tokens, 0 for none.
        echo: It shows a prompt's tokens.
        token_prompts: It takes token ids.
        completions: It continues texts.
        chat: It answers messages.
        prefill: A chat goes on from the beginning of an answer.
        several: `n` is understood.
        most: Continuations that one request gives, however many it asks for.
        readable: It writes whole characters only, as a trained model nearly always does.
        lenient: Asked for more log-probabilities than it shows, it says nothing and shows fewer.
        sharpness: Multiplies its logits, since a random model finds all tokens about alike.
        end_lead: By so much the logit of the end is above all others (default: as it is).
        fresh: Equal requests have draws of their own; otherwise one is answered as another.
        silent_end: Of the token that ends a text nothing is shown.
        end_name: How the token that ends a text is shown (default: as the tokenizer names it).
        lossy: Bytes that are no text by themselves are shown as U+FFFD.
        temperature: A request may say it.
        shortest: Least bound on an answer's length that it takes.
        behind: Address of a server that answers in the model's place, and shows no more than this.
        key: What it asks for; none lets everybody in.
        tells: It repeats in each answer what it was sent.
        faults: What goes wrong, one a POST, in order; None for nothing.
        served: Tokens of each answer that was sent whole.
        lacking: Tokens of each answer that was sent without what was asked for.
        seen: Every request's path, headers and body.
    """

    model: HFModel
    name: str = "toy"
    top: int | None = None
    echo: bool = True
    token_prompts: bool = True
    completions: bool = True
    chat: bool = False
    prefill: bool = True
    several: bool = True
    most: int | None = None
    readable: bool = False
    lenient: bool = False
    sharpness: float = 1.0
    end_lead: float | None = None
    fresh: bool = False
    silent_end: bool = False
    end_name: str = ""
    lossy: bool = False
    temperature: bool = True
    shortest: int = 1
    behind: str = ""
    key: str = ""
    tells: bool = False
    faults: list[str | None] = field(default_factory=list)
    served: list[Usage] = field(default_factory=list)
    lacking: list[Usage] = field(default_factory=list)
    seen: list[tuple[str, dict[str, str], Any]] = field(default_factory=list)
    url: str = ""
    asked_again: threading.Event = field(default_factory=threading.Event)
    lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def usage(self) -> Usage:
        return sum(self.served, Usage())


@contextmanager
def serving(endpoint: Endpoint) -> Iterator[Endpoint]:
    class Handler(_Handler):
        shown = endpoint

    with listening(Handler) as endpoint.url:
        yield endpoint


class Quiet(BaseHTTPRequestHandler):
    """Says nothing of its requests, and answers a POST as a GET."""

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["content-length"]))
        self.do_GET()

    def do_GET(self) -> None:
        raise NotImplementedError


@contextmanager
def listening(handler: type[BaseHTTPRequestHandler]) -> Iterator[str]:
    """Serve on a free port of this machine alone; gives the address up to the version."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = False
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/v1"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Refused(Exception):
    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class _Handler(BaseHTTPRequestHandler):
    shown: Endpoint

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._send(200, {"data": [{"id": self.shown.name}]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        with self.shown.lock:
            self.shown.seen.append((self.path, dict(self.headers), body))
            self.shown.asked_again.set()
            fault = self.shown.faults.pop(0) if self.shown.faults else None
            if fault in ("429", "500"):
                headers = {"retry-after": "7"} if fault == "429" else {}
                self._send(int(fault), {"error": {"message": "later"}}, headers)
                return
            if fault == "no-model":
                body["model"] = f"not-{body['model']}"
            self.shown.asked_again.clear()
            try:
                answer = self._answer(body)
            except _Refused as refusal:
                self._send(refusal.status, {"error": {"message": str(refusal)}})
                return
            if self.shown.tells:
                answer["debug"] = dict(self.headers)
            if fault is None or fault in LACKING:
                usage = answer["usage"]
                booked = self.shown.lacking if fault else self.shown.served
                booked.append(Usage(usage["prompt_tokens"], usage["completion_tokens"]))
        self._send_faulty(fault, answer)

    def _send_faulty(self, fault: str | None, answer: dict[str, Any]) -> None:
        if fault == "no-logprobs":
            for choice in answer["choices"]:
                choice["logprobs"] = None
        if fault == "no-top":
            for choice in answer["choices"]:
                _empty_tops(choice["logprobs"])
        if fault == "slow":
            self.shown.asked_again.wait(PATIENCE_SEC)
        if fault == "error":
            answer = {"error": {"message": f"not for {dict(self.headers)}"}}
        data = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("content-type", "application/json")
        if fault == "truncated":
            data = data[: len(data) // 2]
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        try:
            self.wfile.write(data[: len(data) // 2] if fault == "cut" else data)
        except (BrokenPipeError, ConnectionResetError):
            assert fault == "slow"
        if fault == "cut":
            self.close_connection = True

    def _send(self, status: int, value: Any, headers: Mapping[str, str] | None = None) -> None:
        data = json.dumps(value).encode()
        self.send_response(status)
        for name, text in (headers or {}).items():
            self.send_header(name, text)
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def _answer(self, body: Mapping[str, Any]) -> dict[str, Any]:
        shown = self.shown
        given = self.headers.get("authorization") or self.headers.get("x-api-key") or ""
        if shown.key and given.removeprefix("Bearer ") != shown.key:
            # As some services do, it repeats what it was sent.
            raise _Refused(401, f"incorrect key: {given}")
        if shown.behind:
            return _forwarded(shown, self.path, body)
        if body["model"] != shown.name:
            raise _Refused(404, f"the model {body['model']} does not exist")
        if body.get("n", 1) > 1 and not shown.several:
            raise _Refused(400, "n must be 1")
        if "temperature" in body and not shown.temperature:
            raise _Refused(400, "'temperature' does not support 0 with this model")
        if body.get("max_tokens", shown.shortest) < shown.shortest:
            raise _Refused(400, f"max_tokens must be at least {shown.shortest}")
        if self.path == "/v1/completions" and shown.completions:
            return _completions(shown, body)
        if self.path == "/v1/chat/completions" and shown.chat:
            return _chat(shown, body)
        if self.path == "/v1/messages" and shown.chat:
            return _messages(shown, body)
        raise _Refused(404, f"no such path: {self.path}")


def _empty_tops(logprobs: dict[str, Any]) -> None:
    """Show no likeliest tokens at any place, in both of the ways that APIs do that."""
    if "content" in logprobs:
        for number, place in enumerate(logprobs["content"]):
            place["top_logprobs"] = None if number % 2 else []
    else:
        logprobs["top_logprobs"] = [{} if n % 2 else None for n in range(len(logprobs["tokens"]))]


def _forwarded(shown: Endpoint, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
    chat = "messages" in body
    kept = {k: value for k, value in body.items() if k not in ("logprobs", "top_logprobs")}
    if top := _top(shown, body.get("top_logprobs" if chat else "logprobs")):
        kept |= {"logprobs": True, "top_logprobs": top} if chat else {"logprobs": top}
    # What is drawn is the same whenever the same is asked for.
    sent = json.dumps({"seed": 1, **kept})
    with closing(HTTPConnection(urlsplit(shown.behind).netloc, timeout=PATIENCE_SEC)) as server:
        server.request("POST", path, sent, {"content-type": "application/json"})
        answer = server.getresponse()
        raw = json.loads(answer.read())
    if answer.status != 200:
        raise _Refused(answer.status, raw["error"]["message"])
    return raw


def _completions(shown: Endpoint, body: Mapping[str, Any]) -> dict[str, Any]:
    prompt = body["prompt"]
    if isinstance(prompt, list) and not shown.token_prompts:
        raise _Refused(400, "prompt must be a string")
    top = _top(shown, body.get("logprobs"))
    ids = prompt if isinstance(prompt, list) else prompt_ids(shown.model, prompt)
    echo = bool(body.get("echo"))
    if echo and not shown.echo:
        raise _Refused(400, "echo is not supported")
    choices = []
    for index in range(_count(shown, body)):
        tokens, logprobs, ended = continued(shown, ids, body, index)
        first = 0 if echo else len(ids)
        told = range(first, len(tokens) - (ended and shown.silent_end))
        column = [_spelled(shown, tokens[i]) for i in told]
        parts = {
            "tokens": column,
            "token_logprobs": [float(logprobs[i - 1, tokens[i]]) if i else None for i in told],
            "top_logprobs": [
                dict(_likeliest(shown, logprobs[i - 1], top)) if i else None for i in told
            ],
        }
        choices.append(
            {
                "index": index,
                "text": text_of(shown.model, tokens[first:]),
                "logprobs": parts if top else None,
                "finish_reason": "stop" if ended else "length",
            }
        )
    return {"choices": choices, "usage": _used(ids, choices, body, shown)}


def _chat(shown: Endpoint, body: Mapping[str, Any]) -> dict[str, Any]:
    top = _top(shown, body.get("top_logprobs") if body.get("logprobs") else None)
    messages = list(body["messages"])
    begun = messages.pop()["content"] if messages[-1]["role"] == "assistant" else ""
    if begun and not shown.prefill:
        messages.append({"role": "assistant", "content": begun})
        begun = ""
    text = shown.model.chat_text(messages)
    ids = prompt_ids(shown.model, text, markup=True) + shown.model.encode_following(begun)
    choices = []
    for index in range(_count(shown, body)):
        tokens, logprobs, ended = continued(shown, ids, body, index)
        content = [
            {
                **_told(shown, tokens[i], logprobs[i - 1]),
                "top_logprobs": [
                    _told(shown, t, logprobs[i - 1]) for t in _best(logprobs[i - 1], top)
                ],
            }
            for i in range(len(ids), len(tokens))
        ]
        choices.append(
            {
                "index": index,
                "message": {
                    "role": "assistant",
                    "content": text_of(shown.model, tokens[len(ids) :]),
                },
                "logprobs": {"content": content} if top else None,
                "finish_reason": "stop" if ended else "length",
            }
        )
    return {"choices": choices, "usage": _used(ids, choices, body, shown)}


def _messages(shown: Endpoint, body: Mapping[str, Any]) -> dict[str, Any]:
    ids = prompt_ids(shown.model, shown.model.chat_text(body["messages"]), markup=True)
    tokens, _, ended = continued(shown, ids, body, len(shown.seen))
    new = tokens[len(ids) :]
    usage = {"prompt_tokens": len(ids), "completion_tokens": len(new)}
    return {
        "content": [{"type": "text", "text": text_of(shown.model, new)}],
        "stop_reason": "end_turn" if ended else "max_tokens",
        "usage": usage | {"input_tokens": len(ids), "output_tokens": len(new)},
    }


def _count(shown: Endpoint, body: Mapping[str, Any]) -> int:
    asked = int(body.get("n", 1))
    return asked if shown.most is None else min(asked, shown.most)


def _top(shown: Endpoint, asked: int | None) -> int:
    if not asked:
        return 0
    if shown.lenient and shown.top is not None:
        return min(asked, shown.top)
    if shown.top == 0:
        raise _Refused(400, "logprobs are not supported")
    if shown.top is not None and asked > shown.top:
        raise _Refused(400, f"logprobs must be at most {shown.top}")
    return int(asked)


def continued(
    shown: Endpoint, ids: Sequence[int], body: Mapping[str, Any], index: int
) -> tuple[list[int], torch.Tensor, bool]:
    """Prompt and continuation, log-probabilities after each token, and whether it has ended."""
    longest = body.get("max_tokens") or body.get("max_completion_tokens") or 16
    salt = len(shown.seen) << 20 if shown.fresh else 0
    generator = torch.Generator().manual_seed(salt + 1000 * index + len(ids))
    bias = {int(token): value for token, value in (body.get("logit_bias") or {}).items()}
    tokens = list(ids)
    for _ in range(longest):
        logits = logits_of(shown, tokens)[-1]
        for token, value in bias.items():
            logits[token] += value
        temperature = body.get("temperature", 1.0)
        if temperature:
            probs = (logits / temperature).softmax(-1)
            token = int(torch.multinomial(probs, 1, generator=generator))
        else:
            token = int(logits.argmax())
        tokens.append(token)
        if token in shown.model.end_ids:
            break
    logprobs = logits_of(shown, tokens).log_softmax(-1)
    return tokens, logprobs, tokens[-1] in shown.model.end_ids


def logits_of(shown: Endpoint, tokens: Sequence[int]) -> torch.Tensor:
    logits = shown.model.logits(torch.tensor([list(tokens)]))[0].float() * shown.sharpness
    if shown.end_lead is not None:
        logits[:, sorted(shown.model.end_ids)] = logits.amax(-1, keepdim=True)
        logits[:, sorted(shown.model.end_ids)] += shown.end_lead
    if shown.readable:
        texts = shown.model.vocabulary.token_bytes
        hidden = [text is None or not text.decode("latin1").isprintable() for text in texts]
        hidden = [h or not (text or b"").isascii() for h, text in zip(hidden, texts, strict=True)]
        logits[:, torch.tensor(hidden)] -= 100.0
    return logits


def _spelled(shown: Endpoint, token_id: int) -> str:
    model = shown.model
    text = model.vocabulary.token_bytes[token_id]
    if text is None:
        if shown.end_name and token_id in model.end_ids:
            return shown.end_name
        return str(model.tokenizer.convert_ids_to_tokens(token_id))
    try:
        return text.decode()
    except UnicodeDecodeError:
        if shown.lossy:
            return "\ufffd"
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in text)


def _told(shown: Endpoint, token_id: int, logprobs: torch.Tensor) -> dict[str, Any]:
    text = shown.model.vocabulary.token_bytes[token_id]
    return {
        "token": _spelled(shown, token_id),
        "logprob": float(logprobs[token_id]),
        "bytes": list(text) if text else None,
    }


def _best(logprobs: torch.Tensor, top: int) -> list[int]:
    return logprobs.topk(min(top, len(logprobs))).indices.tolist() if top else []


def _likeliest(shown: Endpoint, logprobs: torch.Tensor, top: int) -> Iterator[tuple[str, float]]:
    for token_id in _best(logprobs, top):
        yield _spelled(shown, token_id), float(logprobs[token_id])


def text_of(model: HFModel, token_ids: Sequence[int]) -> str:
    pieces = (model.vocabulary.token_bytes[i] or b"" for i in token_ids)
    return b"".join(pieces).decode("utf-8", "replace")


def _used(
    ids: Sequence[int], choices: Sequence[Any], body: Mapping[str, Any], shown: Endpoint
) -> dict[str, int]:
    longest = body.get("max_tokens") or 16
    return {"prompt_tokens": len(ids), "completion_tokens": longest * len(choices)}
