"""Exported heads as LoRAs in vLLM itself, without our plugin (`make test-vllm`)."""

import ast
import functools
import importlib
import os
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from saving import saved
from test_export import saved_model
from test_generate import PROMPTS, domain_text
from test_generate import adapter as adapter  # a fixture
from torch import Tensor
from transformers import CONFIG_MAPPING, Qwen2Config
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from trimtab.backends.hf import HFModel
from trimtab.backends.open import open_model
from trimtab.config import ExportConfig, MountConfig
from trimtab.export import ExportResult, export
from trimtab.exporting.engines import (
    VLLM,
    VLLM_MAX_VOCABULARY,
    VLLM_WITH_HEAD,
    VLLM_WITHOUT_HEAD,
)
from trimtab.exporting.linear import LORA_RANKS
from trimtab.exporting.peft import read_peft
from trimtab.mount import mount

if find_spec("vllm") is None:
    pytest.skip("`make test-vllm` installs vLLM", allow_module_level=True)
os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "WARNING"}
os.environ |= {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
vllm: Any = importlib.import_module("vllm")
lora: Any = importlib.import_module("vllm.lora.request")

# vLLM and what it brings warn of their own.
pytestmark = pytest.mark.filterwarnings("default")

TOLERANCE_NATS = 2e-5
"""Largest difference of a log-probability in float32 from host and files as they are."""

HEAD_NATS = 5e-3
"""The same from the mounted head itself, whose constant part a feature of the states carries."""

NEW_TOKENS = 12
STRENGTHS = (1.0, 0.4)
SLOTS = len(STRENGTHS) + 1
"""One more than is used: vLLM's CPU build gives a request without a LoRA the one in the last slot
(index -1 in vllm/lora/ops/torch_ops/lora_ops.py, which its kernels for GPUs skip)."""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("vllm-lora")


@dataclass(frozen=True)
class Served:
    """An engine with one adapter exported twice, at different strengths."""

    engine: Any
    host: HFModel
    exports: tuple[ExportResult, ...]


def exported(adapter: Path, ref: str, out: Path, host: HFModel, strength: float) -> ExportResult:
    told = {"adapter": adapter, "host": ref, "out": out, "to": "peft", "strength": strength}
    return export(ExportConfig.model_validate({**told, "dtype": "float32"}), host=host)


def engine_of(checkpoint: str, rank: int) -> Any:
    return vllm.LLM(
        checkpoint,
        distributed_executor_backend="uni",
        enable_lora=True,
        max_loras=SLOTS,
        max_lora_rank=rank,
        dtype="float32",
        enforce_eager=True,
        max_model_len=512,
        block_size=32,
        gpu_memory_utilization=0.05,
        kv_cache_memory_bytes=1 << 26,
        max_logprobs=-1,
    )


@pytest.fixture(scope="module", params=["llama?vocab=bpe&tied=1", "qwen3?vocab=bpe&tied=0"])
def served(request: pytest.FixtureRequest, base: Path, adapter: Path) -> Served:
    name = request.param.partition("?")[0]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRIMTAB_HOME", str(base / "home"))
        # Heads of 32, as vLLM wants them.
        toy = open_model(f"tiny:{request.param}&hidden=64&heads=2&seed=5", dtype="float32")
        # A feature that hardly varies, as the states of trained models have.
        toy.model.get_input_embeddings().weight.data[:, 0] = 4.0
        ref = str(saved(toy, base / name))
        host = open_model(ref, dtype="float32")
        made = [exported(adapter, ref, base / f"{name}-{s}", host, s) for s in STRENGTHS]
    rank = made[0].record.settings["rank with its padding"]
    return Served(engine_of(ref, int(str(rank))), host, tuple(made))


def answers(served: Served, asked: Sequence[tuple[list[int], int | None]]) -> list[Any]:
    """What one batch of prompts is answered, each with an export by its number or without one."""
    wanted = {"temperature": 0, "max_tokens": NEW_TOKENS, "logprobs": -1, "ignore_eos": True}
    chosen = [
        None if number is None else lora.LoRARequest(f"trimtab-{number}", number + 1, str(folder))
        for number, folder in (
            (number, None if number is None else served.exports[number].folder)
            for _, number in asked
        )
    ]
    prompts = [{"prompt_token_ids": ids} for ids, _ in asked]
    params = vllm.SamplingParams(**wanted)
    found = served.engine.generate(prompts, params, lora_request=chosen, use_tqdm=False)
    return [one.outputs[0] for one in found]


def told(output: Any) -> Tensor:
    """Log-probabilities of all tokens at each place of an answer, shape [tokens, vocab]."""
    return torch.tensor([[one[i].logprob for i in range(len(one))] for one in output.logprobs])


def states(host: HFModel, prompt: Sequence[int], new: Sequence[int]) -> Tensor:
    """The host's states before each token of an answer, shape [tokens, hidden]."""
    ids = torch.tensor([[*prompt, *new]])
    return host.hidden(ids)[0, len(prompt) - 1 : -1]


def prompts(host: HFModel) -> list[list[int]]:
    found = [*PROMPTS, domain_text(7)[:200], "The keel turns the mast"]
    return [host.context_ids() + host.encode(text) for text in found]


def test_requests_of_one_batch_follow_the_exports_they_name(served: Served) -> None:
    host, numbers = served.host, (0, None, 1, 0, 1)
    asked = [(ids, number) for ids in prompts(host) for number in numbers]
    least = 1.0
    for (ids, number), output in zip(asked, answers(served, asked), strict=True):
        hidden = states(host, ids, output.token_ids)
        bare = host.unembedding.logits(hidden)
        expected = bare
        if number is not None:
            found, _ = read_peft(served.exports[number].folder, host)
            expected = bare + hidden @ found.lora_a.T @ found.lora_b.T
        ours = expected.log_softmax(-1)
        torch.testing.assert_close(told(output), ours, atol=TOLERANCE_NATS, rtol=0)
        if number == 0:
            least = min(least, float((ours - bare.log_softmax(-1)).abs().max()))
    assert least > 0.1


def test_they_are_the_mounted_head(served: Served, adapter: Path) -> None:
    host = served.host
    config = MountConfig(adapter=adapter, host=host.ref, carriers=("head",), cache=False)
    head = mount(config, host=host).head
    assert head is not None
    asked = [(ids, number) for ids in prompts(host) for number in range(len(STRENGTHS))]
    most = 0.0
    for (ids, number), output in zip(asked, answers(served, asked), strict=True):
        hidden = states(host, ids, output.token_ids)
        bare = host.unembedding.logits(hidden)
        ours = (bare + STRENGTHS[number] * head.shift(hidden)).log_softmax(-1)
        torch.testing.assert_close(told(output), ours, atol=HEAD_NATS, rtol=0)
        most = max(most, float((ours - bare.log_softmax(-1)).abs().max()))
    assert most > 20 * HEAD_NATS


def test_of_a_family_whose_class_lists_no_head_the_lora_is_refused_in_words(
    base: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRIMTAB_HOME", str(base / "home"))
    config = Qwen2Config(
        vocab_size=512, hidden_size=64, intermediate_size=64, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, bos_token_id=256, eos_token_id=257,
        pad_token_id=258, tie_word_embeddings=False,
    )  # fmt: skip
    ref = saved_model(config, base / "qwen2")
    host = open_model(ref, dtype="float32")
    made = exported(adapter, ref, base / "qwen2-out", host, 1.0)
    engine = engine_of(ref, int(str(made.record.settings["rank with its padding"])))
    assert any("takes no LoRA on the head of qwen2" in note for note in made.record.notes)
    with pytest.raises(ValueError, match="expected target modules in"):
        answers(Served(engine, host, (made,)), [(host.encode("The keel"), 0)])


@functools.cache
def definitions() -> dict[str, list[ast.ClassDef]]:
    """vLLM's classes by name, one for each platform; read, as some need more than is installed."""
    found = defaultdict[str, list[ast.ClassDef]](list)
    for folder in ("model_executor/models", "models"):
        for path in (Path(vllm.__file__).parent / folder).rglob("*.py"):
            for node in ast.parse(path.read_text()).body:
                if isinstance(node, ast.ClassDef):
                    found[node.name].append(node)
    return dict(found)


def lineages(name: str) -> list[list[ast.ClassDef]]:
    """A class in each of its definitions, with what it inherits behind it."""
    return [
        [node, *(one for base in node.bases for line in bases(base) for one in line)]
        for node in definitions().get(name, ())
    ]


def bases(base: ast.expr) -> list[list[ast.ClassDef]]:
    return lineages(ast.unparse(base).rpartition(".")[2])


def stated(line: Sequence[ast.ClassDef], name: str) -> str:
    """The nearest definition of an attribute or a method, as it is written."""
    for part in (part for node in line for part in node.body):
        targets = part.targets if isinstance(part, ast.Assign) else [getattr(part, "target", part)]
        if name in [getattr(one, "name", getattr(one, "id", "")) for one in targets]:
            return ast.unparse(part)
    return ""


def families(holds: Callable[[list[ast.ClassDef]], bool]) -> set[str]:
    """Families of text of whose classes in vLLM something holds."""
    # Phi MoE's class has other capitals in checkpoints, and here, than in transformers.
    served = {name.lower(): of.class_name for name, of in vllm.ModelRegistry.models.items()}
    return {
        family
        for family, name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items()
        if "text_config" not in CONFIG_MAPPING[family].sub_configs
        for line in lineages(served.get(name.lower(), ""))
        if holds(line)
    }


def test_the_families_whose_head_takes_a_lora_are_vllms_own() -> None:
    def takes(line: list[ast.ClassDef]) -> bool:
        named = "'lm_head'" in stated(line, "embedding_modules")
        return named and "SupportsLoRA" in [node.name for node in line]

    # Llama 4's checkpoints ask for a class around it, which does not pass the name on.
    (llama4,) = lineages("Llama4ForConditionalGeneration")
    (qwen3_5,) = lineages("Qwen3VLForConditionalGeneration")
    assert "lm_head" not in stated(llama4, "hf_to_vllm_mapper")
    assert "lm_head" in stated(qwen3_5, "hf_to_vllm_mapper")
    assert families(takes) - {"llama4_text"} == VLLM_WITH_HEAD


def test_the_families_whose_own_head_is_dropped_are_vllms_own() -> None:
    found = families(lambda line: "self.model.embed_tokens" in stated(line, "compute_logits"))
    assert found == VLLM_WITHOUT_HEAD | {"gemma2", "gemma3n_text"}
    for capped in ("gemma2", "gemma3n_text"):
        assert CONFIG_MAPPING[capped]().final_logit_softcapping


def test_the_version_the_ranks_and_the_largest_vocabulary_are_vllms_own() -> None:
    settings = importlib.import_module("vllm.config.lora")
    layer = importlib.import_module("vllm.lora.layers.logits_processor")
    assert f"vLLM {vllm.__version__}".startswith(f"{VLLM}.")
    assert get_args(settings.MaxLoRARanks) == LORA_RANKS
    assert f"vocab_size > {VLLM_MAX_VOCABULARY}:" in Path(layer.__file__).read_text()
