"""Exports in llama.cpp itself, and its server as a host behind an API (`make test-llamacpp`)."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from test_export import adapter as adapter  # a fixture
from test_export import exported, tiny_file
from torch import Tensor

from trimtab.backends.open import open_model
from trimtab.config import HostedOptions
from trimtab.exporting.llamacpp import HOST_NAME, read_lora
from trimtab.hosted.answers import read_answers
from trimtab.hosted.opening import opened
from trimtab.hosted.requests import COMPLETIONS, Prefix, Wanted, completion
from trimtab.hosted.tokens import shown_ids

xllamacpp = pytest.importorskip("xllamacpp", reason="`make test-llamacpp` installs it")

_MODELS = Path(os.environ.get("TRIMTAB_TEST_MODELS", "build/models"))
ARITHMETIC = 5e-4
"""Largest difference of a log-probability, as a share of the largest logit, in float32."""

_READABLE = b"@"
"""llama.cpp shows no probabilities beside a token that is no whole character; this one is forced,
which changes what is sampled and not the probabilities that are shown."""


def logprobs(model: Path, token_ids: Tensor, forced: int, lora: Path | None) -> Tensor:
    """llama.cpp's log-probabilities of the token after some tokens, shape [vocab]."""
    settings = xllamacpp.CommonParams()
    settings.model.path = str(model)
    settings.n_ctx, settings.warmup = 256, False
    settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = 1
    settings.cache_type_k = settings.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    if lora is not None:
        settings.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(str(lora), 1.0)]
    vocabulary = 300_000
    asked = {
        "prompt": token_ids.tolist(),
        "n_predict": 1,
        "logprobs": vocabulary,
        "n_probs": vocabulary,
        "logit_bias": [[forced, 100.0]],
    }
    answer = xllamacpp.Server(settings).handle_completions(asked)
    (position,) = answer["choices"][0]["logprobs"]["content"]
    found = {told["id"]: told["logprob"] for told in position["top_logprobs"]}
    return torch.tensor([found[token_id] for token_id in range(len(found))])


@pytest.mark.parametrize("tied", [0, 1])
def test_llama_cpp_follows_the_head(
    tied: int, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRIMTAB_HOME", str(tmp_path / "home"))
    path = tiny_file(tmp_path / "tiny.gguf", tied)
    made = exported(adapter, str(path), tmp_path / "out", to="gguf")
    served = tmp_path / "out" / HOST_NAME if tied else path
    (forced,) = made.host.encode(_READABLE.decode())
    lora = read_lora(tmp_path / "out" / "head.gguf")
    hidden = made.host.hidden(made.token_ids)[0, -1]
    host = made.host.logits(made.token_ids)[0, -1]
    expected = host + lora.lora_b @ (lora.lora_a @ hidden)
    bare = logprobs(served, made.token_ids[0], forced, None)
    followed = logprobs(served, made.token_ids[0], forced, tmp_path / "out" / "head.gguf")
    for theirs, logits in ((bare, host), (followed, expected)):
        ours = logits.log_softmax(-1)
        # llama.cpp computes the body itself in another way: 2e-4 of the logits' size, measured.
        assert (theirs - ours).abs().max() < ARITHMETIC * logits.abs().max()
    assert (followed - bare).abs().max() > 0.5


@pytest.fixture
def served(tmp_path: Path) -> Iterator[tuple[Path, str]]:
    """A tiny Llama as a GGUF file, and the address of llama.cpp's own server with it."""
    path = tiny_file(tmp_path / "tiny.gguf", 0)
    settings = xllamacpp.CommonParams()
    settings.model.path, settings.port = str(path), 0
    settings.n_ctx, settings.warmup = 1024, False
    settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = 1
    settings.cache_type_k = settings.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    server = xllamacpp.Server(settings)
    yield path, f"{server.listening_address}/v1"


def test_llama_cpps_server_shows_what_the_model_says(
    served: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRIMTAB_HOME", str(tmp_path / "home"))
    path, url = served
    options = HostedOptions(api_url=url, api_tokenizer=str(path), api_top_logprobs=20)
    model = open_model(str(path), dtype="float32")
    ids = model.encode("The rudder turns the ship")
    logprobs = model.logits(torch.tensor([ids]))[0, -1].log_softmax(-1)
    (forced,) = model.encode(_READABLE.decode())
    with opened("openai:tiny", options) as host:
        assert host.by.completions and host.by.chat and host.tokens is not None
        body = completion("tiny", Prefix("", None, ids), Wanted(1, 20), host.by)
        body["logit_bias"] = [[forced, 100.0]]
        answers = host.client.ask(COMPLETIONS, body, lambda raw: read_answers(raw, logprobs=True))
        top = answers.choices[0].places[0].top
        found = shown_ids(top, [host.tokens.id_of(token) for token in top])
    assert len(found) >= 3
    for token_id, logprob in found.items():
        assert logprob == pytest.approx(float(logprobs[token_id]), abs=5e-3)
