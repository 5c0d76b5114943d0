"""Hosts that run in llama.cpp, against the same file in transformers (`make test-llamacpp`)."""

import functools
import json
import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from test_export import tiny_file
from test_generate import PROMPTS, WORDS, made_adapter
from torch import Tensor
from transformers import DynamicCache

from bench.lmeval_tasks import write_task
from bench.transfer.choices import Choice
from trimtab.backends.hf import HFModel
from trimtab.backends.llamacpp.engine import Engine
from trimtab.backends.llamacpp.model import TokenCache
from trimtab.backends.open import open_model
from trimtab.config import (
    CarrierName,
    EvaluateConfig,
    ExportConfig,
    FitConfig,
    GenerateConfig,
    MountConfig,
    ServeConfig,
)
from trimtab.errors import InputError, ModelError
from trimtab.evaluate import evaluate
from trimtab.export import export
from trimtab.fit import fit
from trimtab.generate import generate, steered
from trimtab.mount import mount
from trimtab.serving.run import opened
from trimtab.steering.processor import open_live
from trimtab.store.manifest import read_manifest

pytest.importorskip("llama_cpp", reason="`make test-llamacpp` builds it")

_MODELS = Path(os.environ.get("TRIMTAB_TEST_MODELS", "build/models"))
REAL = _MODELS / "smollm2-135m-instruct" / "model.gguf"

STATE = 5e-6
"""Largest difference of a hidden state or a logit in float32, as a share of the largest."""

FLOAT16 = 1e-3
"""The same where keys and values are rounded to float16, as llama.cpp does by itself."""

QUANTISED_NATS = 0.25
"""Largest mean difference of a log-probability over the vocabulary, on a real quantised host."""


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TRIMTAB_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made_adapter(tmp_path_factory.getbasetemp())


@functools.cache
def both(folder: Path, tied: int = 0) -> tuple[HFModel, HFModel]:
    """A tiny Llama's file in llama.cpp and in transformers, all in float32."""
    path = tiny_file(folder / f"tiny-{tied}.gguf", tied)
    refs = (f"llamacpp:{path}", str(path))
    ours, theirs = (open_model(ref, dtype="float32", engines=True) for ref in refs)
    return ours, theirs


@pytest.fixture
def hosts(tmp_path_factory: pytest.TempPathFactory) -> tuple[HFModel, HFModel]:
    return both(tmp_path_factory.getbasetemp())


def assert_near(ours: Tensor, theirs: Tensor) -> None:
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max() < STATE * theirs.abs().max()


def prompt_ids(host: HFModel, *prompts: str) -> dict[str, Tensor]:
    return host.padded([host.context_ids() + host.encode(prompt) for prompt in prompts])


def written(host: HFModel, **options: Any) -> Tensor:
    settings = {"max_new_tokens": 10, "do_sample": False, **options}
    torch.manual_seed(0)
    return host.model.generate(**prompt_ids(host, *PROMPTS), **settings)  # pyright: ignore[reportCallIssue]


@pytest.mark.parametrize("tied", [0, 1])
def test_states_and_logits_are_those_of_transformers(
    tied: int, tmp_path_factory: pytest.TempPathFactory, capfd: pytest.CaptureFixture[str]
) -> None:
    ours, theirs = both(tmp_path_factory.getbasetemp(), tied)
    given = prompt_ids(ours, *PROMPTS)
    ids, mask = (side.flip(1) for side in given.values())
    hidden = ours.hidden(ids, attention_mask=mask)
    assert_near(hidden[mask.bool()], theirs.hidden(ids, attention_mask=mask)[mask.bool()])
    read = ours.read(ids[:1], last=4)
    assert_near(read.hidden, theirs.hidden(ids[:1]))
    assert read.logits is not None
    assert_near(read.logits, theirs.logits(ids[:1])[:, -4:])
    assert_near(ours.logits(ids[:1]), theirs.logits(ids[:1]))
    assert capfd.readouterr() == ("", "")


def test_the_host_is_the_same_to_an_adapter(hosts: tuple[HFModel, HFModel]) -> None:
    ours, theirs = hosts
    assert ours.fingerprint == theirs.fingerprint
    assert ours.vocabulary.token_bytes == theirs.vocabulary.token_bytes
    assert (ours.end_ids, ours.pad_id, ours.max_tokens) == (
        theirs.end_ids,
        theirs.pad_id,
        theirs.max_tokens,
    )
    assert ours.source != theirs.source


def test_only_the_head_is_unpacked(tmp_path: Path, home: Path) -> None:
    ours, _ = both(tmp_path)
    found = {path.name: path for path in (home / "models").glob("head*/*")}
    assert "config.json" in found and "tokenizer.json" in found
    (weights,) = [path for name, path in found.items() if name.endswith(".safetensors")]
    assert torch.equal(load_file(weights)["weight"], ours.unembedding.weight)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"do_sample": True, "num_return_sequences": 2},
        {"num_beams": 3},
        {"num_beams": 2, "num_return_sequences": 2},
        {"use_cache": False},
        {"prefill_chunk_size": 4},
    ],
    ids=str,
)
def test_transformers_generate_decodes_alike(
    options: dict[str, Any], hosts: tuple[HFModel, HFModel]
) -> None:
    ours, theirs = hosts
    assert torch.equal(written(ours, **options), written(theirs, **options))


def test_a_cache_goes_back_and_is_never_anothers(hosts: tuple[HFModel, HFModel]) -> None:
    ours, theirs = hosts
    model: Any = ours.model
    ids = prompt_ids(ours, PROMPTS[0])["input_ids"]
    first, second = TokenCache(), TokenCache()
    model(ids, past_key_values=first)
    model(ids.flip(1), past_key_values=second)
    first.crop(-3)
    assert first.get_seq_length() == ids.shape[1] - 3
    after = model(ids[:, :2], past_key_values=first).logits
    read = torch.cat([ids[:, :-3], ids[:, :2]], 1)
    assert_near(after, theirs.logits(read)[:, -2:])


def test_a_longer_text_than_was_prepared_for(tmp_path: Path) -> None:
    ours, theirs = both(tmp_path)
    ids = torch.arange(700)[None] % 256
    assert_near(ours.hidden(ids), theirs.hidden(ids))
    with pytest.raises(InputError, match="positions for"):
        engine: Engine = ours.model.base_model.engine  # type: ignore[assignment]
        engine.read([[]], [[1] * (engine.max_tokens + 1)])


@pytest.mark.parametrize("carriers", [("head", "memory"), ("head", "memory", "expert")], ids=str)
def test_steered_text_is_that_of_transformers(
    carriers: tuple[CarrierName, ...], adapter: Path, hosts: tuple[HFModel, HFModel]
) -> None:
    found = []
    for host in hosts:
        config = GenerateConfig(
            host=host.ref,
            prompt=PROMPTS,
            adapter=adapter,
            carriers=carriers,
            max_new_tokens=12,
            dtype="float32",
        )
        found.append(generate(config, host=host))
    assert found[0].texts == found[1].texts
    assert (
        found[0].texts
        != generate(
            GenerateConfig(host=hosts[0].ref, prompt=PROMPTS, max_new_tokens=12), host=hosts[0]
        ).texts
    )


def test_the_scores_that_are_steered_are_the_engines_own(
    adapter: Path, hosts: tuple[HFModel, HFModel]
) -> None:
    scores = []
    for host in hosts:
        mounted = mount(MountConfig(adapter=adapter, host=host.ref), host=host)
        with steered(host, mounted):
            out = written(host, output_scores=True, return_dict_in_generate=True)
        scores.append(torch.stack(out.scores))  # type: ignore[attr-defined]
    torch.testing.assert_close(scores[0], scores[1], atol=1e-3, rtol=1e-4)


def test_drafts_change_no_text(adapter: Path, hosts: tuple[HFModel, HFModel]) -> None:
    host, _ = hosts
    mounted = mount(MountConfig(adapter=adapter, host=host.ref), host=host)
    found = []
    for draft_tokens in (0, 3):
        live = open_live(mounted, host, dtype="float32", draft_tokens=draft_tokens)
        with steered(host, mounted, carriers=("expert",), live=live) as model:
            given: Any = prompt_ids(host, PROMPTS[0])
            del given["attention_mask"]
            found.append(model.generate(**given, max_new_tokens=16, do_sample=False))  # pyright: ignore[reportCallIssue]
    assert torch.equal(found[0], found[1])


def test_evaluate_measures_the_same(
    adapter: Path, hosts: tuple[HFModel, HFModel], tmp_path: Path
) -> None:
    (tmp_path / "text.txt").write_text("The rudder turns the hull. The mast turns the sail.\n" * 8)
    found = []
    for number, host in enumerate(hosts):
        config = EvaluateConfig(
            adapter=adapter,
            host=host.ref,
            data=(str(tmp_path / "text.txt"),),
            rows=("host", "head", "memory", "head+memory"),
            out=tmp_path / f"report-{number}",
            dtype="float32",
        )
        (result,) = evaluate(config, host=host).report.hosts
        found.append({row: estimate.mean for row, estimate in result.domain.items()})
    assert found[0] == pytest.approx(found[1], abs=1e-5)


def test_a_head_fitted_on_one_engine_is_mounted_on_the_other(
    adapter: Path, hosts: tuple[HFModel, HFModel], tmp_path: Path
) -> None:
    ours, theirs = hosts
    settings = {"recording": adapter.parent / "recording", "out": tmp_path / "adapter", "epochs": 1}
    settings |= {"carriers": ("head",), "rank": 4, "active_tokens": 256, "dtype": "float32"}
    made = fit(FitConfig.model_validate({**settings, "host": ours.ref})).folder
    head = read_manifest(made).head
    assert head is not None and head.host == f"llamacpp:{Path(theirs.ref).name}"
    for host in hosts:
        assert mount(MountConfig(adapter=made, host=host.ref), host=host).head is not None


def test_what_needs_weights_in_torch_is_refused(
    adapter: Path, hosts: tuple[HFModel, HFModel], tmp_path: Path
) -> None:
    host, _ = hosts
    with pytest.raises(ModelError, match="weights are needed in torch"):
        open_model(host.ref)
    with pytest.raises(ModelError, match="chooses its devices itself"):
        open_model(host.ref, engines=True, device_map="auto")
    with pytest.raises(ModelError, match="trimtab export needs its weights in torch"):
        export(ExportConfig(adapter=adapter, host=host.ref, to="merged", out=tmp_path), host=host)
    with (
        pytest.raises(ModelError, match="trimtab serve needs its weights in torch"),
        opened(ServeConfig(host=host.ref, port=0), host=host),
    ):
        pass
    with pytest.raises(ModelError, match="keeps keys and values itself"):
        written(host, cache_implementation="static")
    with pytest.raises(ModelError, match="past_key_values is a DynamicCache"):
        written(host, past_key_values=DynamicCache())
    with pytest.raises(ModelError, match="there is no file"):
        open_model("llamacpp:nothing.gguf", engines=True)
    (tmp_path / "broken.gguf").write_bytes(b"GGUF and nothing else")
    with pytest.raises(ModelError, match=r"llama.cpp cannot load .*: \S+"):
        open_model(f"llamacpp:{tmp_path / 'broken.gguf'}", engines=True)


@pytest.mark.skipif(not REAL.exists(), reason="`make models` puts the real model there")
def test_a_real_quantised_host_is_near_its_dequantised_weights() -> None:
    ours, theirs = (
        open_model(ref, dtype="float32", engines=True) for ref in (f"llamacpp:{REAL}", str(REAL))
    )
    assert ours.fingerprint == theirs.fingerprint
    ids = torch.tensor([ours.encode("The capital of France is Paris, and the capital of Italy is")])
    said, expected = (host.logits(ids)[0].log_softmax(-1) for host in (ours, theirs))
    assert (said - expected).abs().mean() < QUANTISED_NATS
    assert ours.encode(" Rome")[0] == int(said[-1].argmax()) == int(expected[-1].argmax())
    hidden = (ours.hidden(ids)[0], theirs.hidden(ids)[0])
    assert torch.nn.functional.cosine_similarity(*hidden).min() > 0.98


def test_llama_cpps_own_arithmetic_keeps_keys_in_float16(
    hosts: tuple[HFModel, HFModel], tmp_path: Path
) -> None:
    plain = open_model(hosts[0].ref, engines=True)
    assert plain.source != hosts[0].source
    ids = torch.arange(64)[None]
    ours, theirs = plain.hidden(ids), hosts[1].hidden(ids)
    assert 1e-5 < (ours - theirs).abs().max() / theirs.abs().max() < FLOAT16


@pytest.mark.skipif(find_spec("lm_eval") is None, reason="needs trimtab[lmeval]")
def test_tasks_are_answered_alike(
    adapter: Path, hosts: tuple[HFModel, HFModel], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    choices = [
        Choice(f"The {word} turns the", (" hull", " sail", " mast"), "", 0) for word in WORDS
    ]
    task = write_task("turns", choices[:4], tmp_path / "task")
    found = []
    for number, host in enumerate(hosts):
        config = EvaluateConfig(
            adapter=adapter, host=host.ref, tasks=(task,), out=tmp_path / f"tasks-{number}"
        )
        evaluate(config, host=host)
        answers = []
        for row in ("host", "head+memory"):
            kept = json.loads((config.out / "tasks" / f"{row}.json").read_text())
            samples = kept["tasks"]["turns"]["samples"]
            answers += [one[0] for sample in samples for one in sample["filtered_resps"]]
        found.append(answers)
    assert len(found[0]) == 24
    assert found[0] == pytest.approx(found[1], abs=1e-3)
