"""The main job on a GPU, against the same on the processor: `make test-cuda` where there is one."""

import json
import os
import queue
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import dispatch_model
from safetensors.torch import load_file
from saving import saved
from test_compare import write_data
from test_generate import PROMPTS, domain_text, made_adapter
from test_serve_engine import collected
from test_tune import stopped_after

from trimtab.backends.hf import HFModel, adopt_model
from trimtab.backends.open import open_model
from trimtab.cli import main
from trimtab.compare import compare
from trimtab.config import (
    ExportConfig,
    FitConfig,
    GenerateConfig,
    MountConfig,
    RecordConfig,
    ServeConfig,
    TuneConfig,
)
from trimtab.errors import ModelError
from trimtab.export import export
from trimtab.fit import fit
from trimtab.generate import generate
from trimtab.mount import mount
from trimtab.record import record
from trimtab.serving.adapters import Adapters
from trimtab.serving.choose import Choosing
from trimtab.serving.engine import Engine
from trimtab.serving.work import Job, Options, Prompt, Steered
from trimtab.steering.processor import open_live, steered
from trimtab.store.recording import Recording
from trimtab.tune import tune

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs a GPU: make test-cuda asks for one"
)

HOST = "tiny:qwen3?vocab=bpe&hidden=32"
HOSTS = (HOST, "tiny:gemma2?hidden=32", "tiny:gpt2?vocab=bpe")
ALL = ("head", "memory", "expert")
ROWS = ("host", "expert", "head", "memory", "head+memory", "live", "all")


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made_adapter(tmp_path_factory.getbasetemp())


def on_cpu(words: Sequence[object]) -> str:
    """What a command says where there is no GPU."""
    run = subprocess.run(
        [sys.executable, "-m", "trimtab", *map(str, words)],
        env=os.environ | {"CUDA_VISIBLE_DEVICES": "", "COLUMNS": "200"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    return run.stdout


def run(words: Sequence[object]) -> None:
    """Run a command here, on the GPU."""
    with pytest.raises(SystemExit) as ended:
        main([str(word) for word in words])
    assert not ended.value.code


def written(model: Any, host: HFModel, prompts: Sequence[Sequence[int]]) -> list[list[int]]:
    return model.generate(**host.padded(prompts), max_new_tokens=12, do_sample=False).tolist()


def moved(ref: str, place: str) -> HFModel:
    return open_model(ref, dtype="float32", device_map=place)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "gemma3", "gpt2", "t5", "marian"])
def test_a_model_says_the_same(family: str) -> None:
    ids = torch.tensor([[5, 9, 30, 77, 5]])
    here, there = (moved(f"tiny:{family}", place) for place in ("cpu", "cuda"))
    assert there.unembedding.device.type == there.logits(ids).device.type == "cuda"
    torch.testing.assert_close(there.logits(ids).cpu(), here.logits(ids), atol=1e-4, rtol=1e-4)
    states = there.hidden(ids)
    torch.testing.assert_close(
        there.unembedding.logits(states), there.logits(ids), atol=1e-4, rtol=1e-4
    )
    assert here.fingerprint == there.fingerprint


def test_models_go_to_the_gpu_unless_told_otherwise() -> None:
    assert open_model(HOST).device.type == "cuda"
    assert open_model(HOST).unembedding.weight.dtype is torch.bfloat16
    assert moved(HOST, "cpu").device.type == "cpu"


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("carriers", [("head",), ("memory",), ("expert",), ALL])
def test_texts_are_those_of_the_processor(
    adapter: Path, host: str, carriers: tuple[str, ...]
) -> None:
    texts = {}
    for place in ("cpu", "cuda"):
        opened = moved(host, place)
        found = mount(MountConfig(adapter=adapter, host=host), host=opened)
        live = None
        if "expert" in carriers:
            live = open_live(found, opened, dtype="float32", draft_tokens=0)
        with steered(opened, found, carriers=carriers, live=live) as model:  # pyright: ignore
            prompts = [opened.context_ids() + opened.encode(prompt) for prompt in PROMPTS]
            texts[place] = written(model, opened, prompts)
    assert texts["cuda"] == texts["cpu"]


@pytest.mark.parametrize("options", [{}, {"draft_tokens": 4}, {"temperature": 1.0, "top_p": 0.9}])
@pytest.mark.parametrize("dtype", ["float32", "auto"])
def test_generate_with_all_carriers(adapter: Path, dtype: str, options: dict[str, Any]) -> None:
    given = {"host": HOST, "prompt": PROMPTS[:1], "adapter": adapter, "dtype": dtype}
    given |= {"carriers": ALL, "max_new_tokens": 12, "draft_tokens": 0, **options}
    once, again = (generate(GenerateConfig.model_validate(given)) for _ in range(2))
    assert once.texts == again.texts
    assert once.tokens[0] > 0


def test_strength_0_is_the_host_itself(adapter: Path) -> None:
    given = {"host": HOST, "prompt": PROMPTS, "max_new_tokens": 12}
    bare = generate(GenerateConfig.model_validate(given))
    still = generate(GenerateConfig.model_validate(given | {"adapter": adapter, "strength": 0.0}))
    assert bare.texts == still.texts


def test_the_main_job(tmp_path: Path) -> None:
    for number in range(6):
        (tmp_path / f"{number}.txt").write_text(domain_text(number))
    tuning = ["--model", "tiny:llama?hidden=32", "--window-tokens", 64, "--validations", 1]
    report = ["--out", tmp_path / "report"]
    steps = [
        ["tune", tmp_path / "[0-4].txt", *tuning, "--out", tmp_path / "expert"],
        ["record", tmp_path / "expert", "--out", tmp_path / "recording"],
        ["fit", tmp_path / "recording", "--out", tmp_path / "adapter"],
        ["mount", tmp_path / "adapter", HOST],
        ["generate", "The rudder", "--host", HOST, "--adapter", tmp_path / "adapter"],
        ["evaluate", tmp_path / "adapter", HOST, "--data", tmp_path / "5.txt", *report],
    ]
    for step in steps:
        run(step)
    figures = json.loads((tmp_path / "report" / "report.json").read_text())["hosts"][0]
    assert all(0 < f["mean"] < 20 for f in figures["domain_bits_per_byte"].values())


def test_evaluate_finds_what_the_processor_finds(adapter: Path, tmp_path: Path) -> None:
    (tmp_path / "sea.txt").write_text(domain_text(77))
    words = ["evaluate", adapter, HOST, "--data", tmp_path / "sea.txt", "--dtype", "float32"]
    words += [word for row in ROWS for word in ("--rows", row)]
    on_cpu([*words, "--out", tmp_path / "cpu"])
    run([*words, "--out", tmp_path / "cuda"])
    here, there = (
        json.loads((tmp_path / name / "report.json").read_text())["hosts"][0]
        for name in ("cpu", "cuda")
    )
    for kind in ("domain_bits_per_byte", "general_bits_per_byte"):
        for row, figure in here[kind].items():
            assert there[kind][row]["mean"] == pytest.approx(figure["mean"], rel=2e-3), row


def test_a_recording_is_that_of_the_processor(adapter: Path, tmp_path: Path) -> None:
    expert = adapter.parent / "expert"
    given = {"expert": expert, "dtype": "float32", "general": (str(adapter.parent / "*.md"),)}
    record(RecordConfig.model_validate(given | {"out": tmp_path / "cuda"}))
    words = ["record", expert, "--dtype", "float32", "--out", tmp_path / "cpu"]
    on_cpu([*words, "--general", adapter.parent / "*.md"])
    here, there = (Recording.open(tmp_path / name).read("train") for name in ("cpu", "cuda"))
    assert here.keys() == there.keys()
    for name in here:
        torch.testing.assert_close(there[name], here[name], atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("encoding", ["exact", "sparse", "sampled"])
def test_shards_written_behind_the_passes_are_the_same(
    adapter: Path, encoding: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = {"expert": adapter.parent / "expert", "encoding": encoding, "shard_tokens": 512}
    given |= {"general": (str(adapter.parent / "*.md"),)}
    record(RecordConfig.model_validate(given | {"out": tmp_path / "behind"}))
    monkeypatch.setattr(sys.modules["trimtab.record"], "_is_on_gpu", lambda _: False)
    record(RecordConfig.model_validate(given | {"out": tmp_path / "in turn"}))
    names = [path.name for path in (tmp_path / "behind").iterdir()]
    assert len(names) > 6
    for name in names:
        one, other = (tmp_path / way / name for way in ("behind", "in turn"))
        assert one.read_bytes() == other.read_bytes()


def test_training_goes_on_where_it_was(tmp_path: Path) -> None:
    for number in range(4):
        (tmp_path / f"{number}.txt").write_text(domain_text(number))
    given = {"model": "tiny:llama?hidden=32", "data": (str(tmp_path / "*.txt"),), "epochs": 4}
    given |= {"window_tokens": 64, "checkpoint_every_sec": 0.0, "validations": 2}

    whole = TuneConfig.model_validate(given | {"out": tmp_path / "whole"})
    halves = TuneConfig.model_validate(given | {"out": tmp_path / "halves"})
    tune(whole)
    with pytest.raises(KeyboardInterrupt):
        tune(halves, progress=stopped_after(3))
    tune(halves)
    ours, theirs = (
        load_file(c.out / "lora" / "adapter_model.safetensors") for c in (halves, whole)
    )
    for name, weight in theirs.items():
        torch.testing.assert_close(ours[name], weight, atol=1e-5, rtol=1e-4)


def test_a_head_is_fitted_on_a_host(adapter: Path, tmp_path: Path) -> None:
    given = {"recording": adapter.parent / "recording", "out": tmp_path / "fitted", "host": HOST}
    given |= {"carriers": ("head",), "rank": 4}
    assert fit(FitConfig.model_validate(given)).folder.is_dir()


def test_full_tuning(tmp_path: Path) -> None:
    (tmp_path / "sea.txt").write_text(domain_text(1) * 3)
    given = {"model": "tiny:gemma2?hidden=32", "data": (str(tmp_path / "*.txt"),)}
    given |= {"out": tmp_path / "expert", "method": "full", "window_tokens": 64}
    tune(TuneConfig.model_validate(given))


@pytest.mark.parametrize("to", ["peft", "merged", "onnx"])
def test_exports(adapter: Path, to: str, tmp_path: Path) -> None:
    host = saved("tiny:llama?vocab=bpe&tied=0", tmp_path / "host")
    given = {"adapter": adapter, "host": str(host), "to": to, "out": tmp_path / "export"}
    export(ExportConfig.model_validate(given))


def test_a_server_answers_as_one_request_alone(adapter: Path) -> None:
    host = moved(HOST, "cuda")
    config = {"host": HOST, "adapter": (f"sea={adapter}",), "carriers": ALL, "dtype": "float32"}
    adapters = Adapters(ServeConfig.model_validate(config | {"name": "host"}), host)
    adapters.load("sea", adapter)
    mixture = adapters.mixture(adapters.chosen("host+sea", None, None))
    alone = [_answers(host, mixture, [prompt])[0] for prompt in PROMPTS]
    assert _answers(host, mixture, PROMPTS) == alone


def _answers(host: HFModel, mixture: Any, prompts: Sequence[str]) -> list[str]:
    engine = Engine(host, slots=4, queue=16)
    engine.start()
    try:
        queues = []
        for text in prompts:
            events: queue.Queue[Any] = queue.Queue()
            ids = tuple(host.context_ids() + host.encode(text))
            options = Options(max_tokens=8, choosing=Choosing(temperature=0.0))
            job = Job(
                [Prompt(ids)],
                options,
                steered=Steered(mixture, (None,)),
                tell=events.put,
                time_limit_sec=200,
            )
            engine.submit(job)
            queues.append(events)
        return [collected(events)[0] for events in queues]
    finally:
        engine.stop()


@pytest.mark.parametrize("body_first", [True, False])
def test_a_host_on_two_devices(adapter: Path, body_first: bool) -> None:
    near, far = ("cuda:0", "cpu") if body_first else ("cpu", "cuda:0")
    plain = moved("tiny:llama?vocab=bpe&tied=0", "cpu")
    model = moved("tiny:llama?vocab=bpe&tied=0", "cpu").model
    names = {"model.embed_tokens": near, "model.layers.0": near, "model.layers.1": far}
    names |= {"model.norm": far, "model.rotary_emb": near, "lm_head": far}
    there: dict[str, Any] = names
    main_device: Any = "cpu"
    spread: Any = dispatch_model(model, there, main_device=main_device, force_hooks=True)
    host = adopt_model("spread", spread, plain.tokenizer)
    texts = []
    for opened in (plain, host):
        found = mount(MountConfig(adapter=adapter, host="llama", cache=False), host=opened)
        live = open_live(found, opened, dtype="float32", draft_tokens=0)
        with steered(opened, found, carriers=ALL, live=live) as steered_model:
            prompts = [opened.context_ids() + opened.encode(prompt) for prompt in PROMPTS]
            texts.append(written(steered_model, opened, prompts))
    assert texts[0] == texts[1]


def test_a_host_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    folder = saved("tiny:llama?vocab=bpe&tied=0", tmp_path / "host")
    split: Any = {"model": 0, "lm_head": "cpu"}
    with pytest.raises(ModelError, match="does not fit"):
        open_model(str(folder), device_map=split)


def test_compare(tmp_path: Path) -> None:
    result = compare(write_data(tmp_path))
    assert result is not None
    assert torch.cuda.max_memory_allocated() > 0
