"""What of the plugin needs no vLLM: both runners' batches, on a host that leaves its states."""

import os
import random
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from saving import saved
from test_generate import PROMPTS, domain_text
from test_generate import adapter as adapter  # a fixture
from test_imports import heavy_after
from torch import Tensor, nn
from transformers import GenerationConfig

from trimtab.backends.hf import HFModel
from trimtab.backends.open import open_model
from trimtab.config import MountConfig
from trimtab.errors import InputError, ModelError, TrimtabError
from trimtab.generate import steered
from trimtab.mount import mount
from trimtab.steering.mounted import Mounted
from trimtab.vllm.batch import Known, Slots, steer_v1, steer_v2
from trimtab.vllm.hook import VARIABLE, register
from trimtab.vllm.plugin import Plugin, check_engine
from trimtab.vllm.settings import read_settings
from trimtab.vllm.spans import spans_by_ends, spans_by_texts
from trimtab.vllm.stash import Pass, stashing

NEW_TOKENS = 5
SLOTS = 16


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("plugin")


@pytest.fixture(scope="module")
def checkpoint(base: Path) -> Path:
    return saved("tiny:qwen3?vocab=bpe&hidden=32", base / "host")


@pytest.fixture(scope="module")
def written(base: Path, adapter: Path) -> Iterator[Path]:
    """The plugin's settings, which the environment names."""
    path = base / "plugin.toml"
    path.write_text(f'adapter = ["sea={adapter}", "ship={adapter}"]\ndtype = "float32"\n')
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(VARIABLE, str(path))
        patch.setenv("TRIMTAB_HOME", str(base / "home"))
        yield path


@pytest.fixture(scope="module")
def host(checkpoint: Path) -> HFModel:
    return open_model(str(checkpoint), dtype="float32")


@pytest.fixture(scope="module")
def mounted(checkpoint: Path, adapter: Path, host: HFModel, written: Path) -> Mounted:
    config = {"adapter": adapter, "host": str(checkpoint), "dtype": "float32"}
    return mount(MountConfig.model_validate(config), host=host)


def engine_of(checkpoint: Path, **changes: Any) -> SimpleNamespace:
    """vLLM's configuration, as far as the plugin reads it."""
    model = {
        "model": str(checkpoint),
        "revision": None,
        "is_encoder_decoder": False,
        "is_multimodal_model": False,
        "enable_prompt_embeds": False,
        "get_vocab_size": lambda: 512,
    }
    found = {
        "model_config": SimpleNamespace(**model | changes.pop("model", {})),
        "parallel_config": SimpleNamespace(),
        "compilation_config": SimpleNamespace(cudagraph_mode=None),
        "speculative_config": None,
        "lora_config": None,
        "kv_transfer_config": None,
    }
    return SimpleNamespace(**found | changes)


class Model(nn.Module):
    """A host whose pass over a batch is given: vLLM's own would know whose tokens are whose."""

    def __init__(self, *, vllm_config: Any, prefix: str = "", host: HFModel) -> None:
        super().__init__()
        del vllm_config, prefix
        self.host, self.hidden = host, torch.empty(0)

    def forward(self, input_ids: Tensor, positions: Tensor) -> Tensor:
        assert input_ids.shape == positions.shape
        return self.hidden

    def compute_logits(self, hidden_states: Tensor) -> Tensor:
        return self.host.unembedding.logits(hidden_states)


@dataclass
class Request:
    """A request that a runner answers."""

    prompt: list[int]
    given: dict[str, Any] | None
    output: list[int] = field(default_factory=list)
    logprobs: list[Tensor] = field(default_factory=list)
    done: int = 0
    slot: int = -1

    @property
    def token_ids(self) -> list[int]:
        return self.prompt + self.output


@dataclass
class Runner:
    """Answers as vLLM's runners do: prompts in parts, requests in any order, some begun anew."""

    host: HFModel
    model: nn.Module
    engine: Any
    second: bool
    chosen: random.Random
    tokens: Tensor = field(default_factory=lambda: torch.zeros(SLOTS, 512, dtype=torch.int32))
    lengths: Any = field(default_factory=lambda: np.zeros(SLOTS, dtype=np.int32))
    known: dict[int, Known] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.states = SimpleNamespace(
            prompt_len=SimpleNamespace(np=self.lengths),
            all_token_ids=SimpleNamespace(gpu=self.tokens),
        )
        self.plugin = Plugin(self.engine)
        self.slots = Slots(self.plugin, self.states)

    def answer(self, requests: Sequence[Request]) -> None:
        waiting, running = list(requests), []
        while waiting or running:
            while waiting and len(running) < 4:
                self._begin(waiting.pop(0), running)
            if len(running) > 1 and self.chosen.random() < 0.08:
                dropped = running.pop(self.chosen.randrange(len(running)))
                dropped.done = 0
                waiting.append(dropped)
            self.chosen.shuffle(running)
            self._step(running)
            running = [one for one in running if len(one.output) < NEW_TOKENS]

    def _begin(self, request: Request, running: list[Request]) -> None:
        free = set(range(SLOTS)) - {one.slot for one in running}
        request.slot = self.chosen.choice(sorted(free))
        params = SimpleNamespace(extra_args=request.given)
        self.tokens[request.slot] = -7
        self.lengths[request.slot] = len(request.prompt)
        self.begin(request, params)
        running.append(request)

    def begin(self, request: Request, params: Any) -> None:
        self.slots.begin(request.slot, params)
        steers = self.plugin.request(params, request.prompt)
        self.known[request.slot] = Known(request.prompt, request.output, steers)

    def _step(self, running: list[Request]) -> None:
        parts = []
        for one in running:
            left = len(one.token_ids) - one.done
            parts.append(range(one.done, one.done + min(left, self.chosen.choice((1, 9, 40, 300)))))
            # What the second runner holds of a request: all its tokens.
            self.tokens[one.slot, : len(one.token_ids)] = torch.tensor(one.token_ids)
        states = [
            self.host.hidden(torch.tensor([one.token_ids[: part.stop]]))[0, part.start :]
            for one, part in zip(running, parts, strict=True)
        ]
        ids = [
            i
            for one, part in zip(running, parts, strict=True)
            for i in one.token_ids[part.start : part.stop]
        ]
        positions = [place for part in parts for place in part]
        ends = torch.tensor([len(part) for part in parts]).cumsum(0) - 1
        # Graphs are recorded for certain sizes: what is beyond the batch means nothing.
        padding = self.chosen.randrange(5)
        self.model.hidden = torch.cat([*states, torch.randn(padding, states[0].shape[1])])
        if padding == 4 and all(len(part) == 1 for part in parts):
            # The pass was recorded: no Python runs.
            hidden = self.model.hidden
        else:
            hidden = self.model(
                input_ids=torch.tensor([*ids, *[3] * padding]),
                positions=torch.tensor([*positions, *[0] * padding]),
            )
        logits = self.model.compute_logits(hidden[ends])
        self.steer(running, parts, logits)
        for one, part, row in zip(running, parts, logits, strict=True):
            one.done = part.stop
            if one.done == len(one.token_ids):
                one.logprobs.append(row.log_softmax(-1))
                one.output.append(int(row.argmax()))

    def steer(self, running: list[Request], parts: list[range], logits: Tensor) -> None:
        if self.second:
            context = SimpleNamespace(
                idx_mapping_np=np.array([one.slot for one in running]),
                pos=torch.tensor([part.stop - 1 for part in parts]),
            )
            steer_v2(self.plugin, self.slots, logits, context)
        else:
            known = {row: self.known[one.slot] for row, one in enumerate(running)}
            steer_v1(self.plugin, known, logits)


def alone(
    host: HFModel, mounted: Mounted, prompt: Sequence[int], carriers: tuple, strength: float
) -> tuple[list[int], Tensor]:
    """From transformers' own `generate`, steered by `trimtab.steered`."""
    config = GenerationConfig(
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        eos_token_id=len(host.vocabulary),  # none that is ever written
        pad_token_id=host.pad_id,
        output_scores=True,
        return_dict_in_generate=True,
    )
    ids = torch.tensor([list(prompt)])
    with steered(host, mounted, carriers=carriers, strength=strength) as model:
        found: Any = model.generate(ids, attention_mask=ids * 0 + 1, generation_config=config)
    return found.sequences[0, len(prompt) :].tolist(), torch.cat(found.scores).log_softmax(-1)


CHOICES: list[tuple[dict[str, Any] | None, tuple, float]] = [
    ({"trimtab": "sea"}, ("head", "memory"), 1.0),
    (None, ("head",), 0.0),
    ({"trimtab": "ship:1.7", "trimtab_carriers": "head"}, ("head",), 1.7),
    ({"trimtab": "sea:0.4", "trimtab_carriers": ["memory"]}, ("memory",), 0.4),
]


@pytest.mark.parametrize("second", [False, True])
def test_each_request_of_either_runner_is_that_of_generate_alone(
    second: bool, checkpoint: Path, host: HFModel, mounted: Mounted
) -> None:
    engine = engine_of(checkpoint)
    model: Any = stashing(Model)(vllm_config=engine, host=host)
    runner = Runner(host, model, engine, second, random.Random(second))
    check_answers(runner, mounted)


def check_answers(runner: Runner, mounted: Mounted) -> None:
    """Each answer among many is that of the same request alone."""
    host = runner.host
    texts = [*PROMPTS[:2], domain_text(7)]
    choices = [(host.encode(text), one) for text in texts for one in CHOICES]
    runner.chosen.shuffle(choices)
    requests = [Request(ids, given) for ids, (given, _, _) in choices]
    with torch.inference_mode():
        runner.answer(requests)
    for request, (ids, (_, carriers, strength)) in zip(requests, choices, strict=True):
        new, logprobs = alone(host, mounted, ids, carriers, strength)
        assert request.output == new
        torch.testing.assert_close(torch.stack(request.logprobs), logprobs, atol=2e-4, rtol=0)


# Which tokens of a pass are whose.


@st.composite
def passes(draw: st.DrawFn) -> tuple[Pass, list[list[int]], list[range]]:
    """Requests whose tokens are few, so that texts go on like each other's."""
    texts, ids, positions, spans = [], [], [], []
    for _ in range(draw(st.integers(1, 6))):
        text = draw(st.lists(st.integers(0, 1), min_size=1, max_size=12))
        start = draw(st.integers(0, len(text) - 1))
        stop = draw(st.integers(start + 1, len(text)))
        spans.append(range(len(ids), len(ids) + stop - start))
        ids += text[start:stop]
        positions += range(start, stop)
        texts.append(text)
    padding = draw(st.integers(0, 3))
    tensors = torch.tensor(ids + [0] * padding), torch.tensor(positions + [0] * padding)
    return Pass(*tensors, torch.arange(len(tensors[0]) * 2.0).reshape(-1, 2)), texts, spans


@settings(max_examples=100, deadline=None)
@given(passes())
def test_the_tokens_of_a_pass_are_told_apart(
    found: tuple[Pass, list[list[int]], list[range]],
) -> None:
    read, texts, spans = found
    sampled = read.hidden[[span[-1] for span in spans]]
    assert spans_by_texts(read, texts, sampled) == spans
    assert spans_by_ends(read, [int(read.positions[span[-1]]) for span in spans]) == spans


def test_a_pass_of_other_requests_is_seen() -> None:
    read = Pass(torch.tensor([1, 2]), torch.tensor([0, 1]), torch.eye(2))
    with pytest.raises(ValueError, match="was sampled from"):
        spans_by_texts(read, [[1, 2]], torch.tensor([[5.0, 5.0]]))
    with pytest.raises(ValueError, match="from 2 to 2 was sampled from"):
        spans_by_texts(read, [[1, 2], [1]], torch.eye(2)[[1, 0]])


def test_states_that_were_not_kept_are_missed(checkpoint: Path, written: Path) -> None:
    plugin = Plugin(engine_of(checkpoint))
    with pytest.raises(RuntimeError, match="3 rows of logits and none of the host's states"):
        plugin.states(3)


# Settings, and what is refused.


def test_settings_that_cannot_be_used(
    tmp_path: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    with pytest.raises(InputError, match="names no file"):
        read_settings()
    path = tmp_path / "plugin.toml"
    monkeypatch.setenv(VARIABLE, str(path))
    for text, words in (
        (None, "No such file"),
        ("adapter = [", "cannot be read"),
        ("adapter = []", "adapter: "),
        ('adapter = ["sea"]', "NAME=FOLDER"),
        (f'adapter = ["sea={adapter}"]\ncarriers = ["expert"]', "carriers.0"),
        (f'adapter = ["sea={adapter}"]\ndefault = "ship"', "'ship', which is no adapter here"),
        (f'adapter = ["sea={tmp_path}"]', "so it is no adapter"),
    ):
        if text is not None:
            path.write_text(text)
        with pytest.raises(TrimtabError, match=words):
            read_settings()


def test_a_default_steers_requests_that_ask_for_nothing(
    written: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "plugin.json"
    path.write_text(f'{{"adapter": ["sea={adapter}"], "default": "sea:0.5", "carriers": ["head"]}}')
    monkeypatch.setenv(VARIABLE, str(path))
    found = read_settings()
    pairs: Any = ((None, "sea:0.5"), ({"trimtab": "sea"}, "sea"), ({"other": 1}, "sea:0.5"))
    for arguments, words in pairs:
        asked = found.asked(arguments)
        assert asked is not None and asked.adapters == words
    assert found.asked({"trimtab": ""}) is None
    with pytest.raises(InputError, match="memory of sea, which is not served"):
        found.asked({"trimtab_carriers": "memory"})


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model": {"is_encoder_decoder": True}}, "an encoder-decoder"),
        ({"model": {"is_multimodal_model": True}}, "more than text"),
        ({"model": {"enable_prompt_embeds": True}}, "embeddings"),
        ({"speculative_config": object()}, "speculative decoding"),
        ({"lora_config": object()}, "LoRA"),
        ({"kv_transfer_config": object()}, "from elsewhere"),
        ({"parallel_config": SimpleNamespace(enable_batch_sharded_sampling=True)}, "batch-sharded"),
    ],
)
def test_engines_that_cannot_be_steered(
    checkpoint: Path, changes: dict[str, Any], words: str
) -> None:
    check_engine(engine_of(checkpoint))
    with pytest.raises(ModelError, match=words):
        check_engine(engine_of(checkpoint, **changes))


def test_a_head_of_another_size_is_refused(checkpoint: Path, written: Path) -> None:
    engine = engine_of(checkpoint, model={"get_vocab_size": lambda: 640})
    with pytest.raises(ModelError, match=r"640 logits, and the head of .* has 512 rows"):
        Plugin(engine)


def test_vllm_users_who_do_not_steer_are_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    before = "vllm" in sys.modules
    register()
    assert ("vllm" in sys.modules) is before
    assert VARIABLE not in os.environ
    assert heavy_after("import trimtab.vllm, trimtab.vllm.hook", cwd=tmp_path) == []
