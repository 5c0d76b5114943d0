"""Models from a hub: the real client against a small hub of our own."""

import hashlib
import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

import pytest
import torch
from huggingface_hub import constants
from saving import saved
from test_bad_input import refusal

from trimtab.backends.open import open_model
from trimtab.backends.pair import open_pair
from trimtab.config import TuneConfig
from trimtab.errors import ModelError
from trimtab.store.expert import read_expert
from trimtab.tune import tune

_COMMIT = "0123456789abcdef0123456789abcdef01234567"
_NAME = "someone/small"


class _Hub(BaseHTTPRequestHandler):
    files: dict[str, bytes]
    asked: list[str]

    def do_GET(self):
        self._answer(body=True)

    def do_HEAD(self):
        self._answer(body=False)

    def log_message(self, *_args):
        pass

    def _answer(self, *, body):
        path = unquote(urlsplit(self.path).path)
        self.asked.append(path)
        if path.startswith(f"/api/models/{_NAME}"):
            self._send(self._info(path), body=body)
        elif path.startswith(f"/{_NAME}/resolve/{_COMMIT}/"):
            self._send(self.files[path.rsplit("/", 1)[1]], body=body)
        elif path == "/api/models/someone/gated":
            self._fail(403, "GatedRepo")
        else:
            self._fail(404, "RepoNotFound")

    def _info(self, path):
        revision = path.partition("/revision/")[2]
        assert revision in ("", "v1", _COMMIT)
        names = [*self.files, "original/consolidated.safetensors", "pytorch_model.bin"]
        siblings = [{"rfilename": name, "size": len(self.files.get(name, b""))} for name in names]
        info = {"id": _NAME, "modelId": _NAME, "sha": _COMMIT, "siblings": siblings}
        return json.dumps(info).encode()

    def _send(self, content, *, body):
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Content-Type", "application/json")
        self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        self.send_header("X-Repo-Commit", _COMMIT)
        self.end_headers()
        if body:
            self.wfile.write(content)

    def _fail(self, status, code):
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()


@pytest.fixture
def hub(tmp_path, monkeypatch):
    saved("tiny:llama?layers=1&hidden=32", tmp_path / "model")
    files = {file.name: file.read_bytes() for file in (tmp_path / "model").iterdir()}
    handler = type("Hub", (_Hub,), {"files": files, "asked": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    yield handler
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_model_is_fetched_by_name_and_revision_and_later_found_without_the_hub(hub, monkeypatch):
    fetched = []

    @contextmanager
    def progress(label, total):
        fetched.append((label, total))
        yield lambda amount: fetched.append(amount)

    ids = torch.tensor([[1, 2, 3]])
    expected = open_model("tiny:llama?layers=1&hidden=32", dtype="float32").logits(ids)
    for ref in (_NAME, f"{_NAME}@v1"):
        opened = open_model(ref, dtype="float32", progress=progress)
        assert (opened.ref, opened.revision) == (ref, _COMMIT)
        assert torch.equal(opened.logits(ids), expected)
    assert fetched[0] == (f"downloading {_NAME} (bytes)", sum(fetched[1 : 1 + len(hub.files)]))
    assert not [path for path in hub.asked if path.endswith((".bin", "consolidated.safetensors"))]
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    found = open_model(f"{_NAME}@{_COMMIT}", dtype="float32")
    assert torch.equal(found.logits(ids), expected)


@pytest.mark.usefixtures("hub")
def test_an_expert_names_the_commit_of_its_base(tmp_path):
    for n in range(4):
        (tmp_path / f"{n}.txt").write_text(f"The rudder turns the hull {n} times. " * 20)
    settings = {"learning_rate": 0.02, "window_tokens": 32, "batch_windows": 8, "max_tokens": 512}
    data, out = (f"{tmp_path}/*.txt",), tmp_path / "expert"
    tune(TuneConfig(model=f"{_NAME}@v1", data=data, out=out, dtype="float32", **settings))
    base = read_expert(out).base
    assert (base.ref, base.revision) == (f"{_NAME}@v1", _COMMIT)
    assert open_pair(out, dtype="float32").reference.revision == _COMMIT


@pytest.mark.parametrize(
    "name, found, remedy",
    [
        ("someone/else", "there is no model someone/else", "GGUF file"),
        ("someone/gated", "asks for its licence to be accepted", "hf auth login"),
    ],
)
@pytest.mark.usefixtures("hub")
def test_a_name_that_cannot_be_had_is_told_by_every_verb(name, found, remedy, tmp_path, capsys):
    with pytest.raises(ModelError, match=found) as caught:
        open_model(name)
    assert remedy in caught.value.hint
    (tmp_path / "a.txt").write_text("The rudder turns the hull. " * 40)
    for words in (
        ("tune", tmp_path / "a.txt", "--model", name, "--out", tmp_path / "expert"),
        ("generate", "a", "--host", name),
    ):
        said = refusal(capsys, *words)
        assert found in said and remedy in said
    assert not (tmp_path / "expert").exists()
