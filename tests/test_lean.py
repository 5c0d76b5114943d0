"""Short passes in fewer operations give transformers' own states, whatever the mask and cache."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_pair_passes import pair_of
from torch import Tensor
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from trimtab.backends.hf import HFModel
from trimtab.backends.int8 import quantise
from trimtab.backends.lean import FEW_TOKENS, make_lean
from trimtab.backends.open import open_model
from trimtab.backends.pair_passes import prepare
from trimtab.backends.token_tree import ModelCache, TokenTree, run_line, run_trees

SIZES: dict[str, Any] = {
    "vocab_size": 99,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
YARN = {"rope_type": "yarn", "rope_theta": 10_000.0, "factor": 4.0}
MODELS: dict[str, Any] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True)),
    "yarn": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, rope_parameters=YARN)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**SIZES, sliding_window=5)),
    "qwen2": lambda: Qwen2ForCausalLM(
        Qwen2Config(**SIZES, use_sliding_window=True, sliding_window=5, max_window_layers=1)
    ),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES, head_dim=24)),
}


def branching() -> TokenTree:
    tree = TokenTree()
    for line in ([1, 2, 3, 4, 5, 6, 7, 8], [1, 2, 3, 9, 10], [1, 2, 3, 4, 5, 11], [12, 13]):
        tree.add(line)
    return tree


def opened(make: Any) -> tuple[HFModel, PreTrainedModel]:
    """A model under another's tokenizer, which passes of token ids never ask."""
    torch.manual_seed(0)
    model: PreTrainedModel = make().eval()
    for name, parameter in model.named_parameters():
        if name.endswith(("bias", "norm.weight")):
            torch.nn.init.normal_(parameter, 0.5, 0.3)
    host = open_model("tiny:llama", dtype="float32")
    return replace(host, model=model), model


def states(model: HFModel, copies: int) -> list[Tensor]:
    """Of a line, of a tree that goes on from it with branches, and of a token after a line."""
    cached, first = ModelCache(), TokenTree()
    first.add([1, 2, 3])
    found = run_trees(model, [(first, cached)], copies=copies)
    found += run_trees(model, [(branching(), cached)], copies=copies)
    line = ModelCache()
    run_line(model, list(range(20)), line)
    return [*found, run_line(model, list(range(21)), line)]


@pytest.mark.parametrize("copies", [1, 2])
@pytest.mark.parametrize("name", MODELS)
def test_states_are_transformers_own(name: str, copies: int) -> None:
    wrapped, model = opened(MODELS[name])
    model.double()
    expected = states(wrapped, copies)
    assert make_lean(model)
    assert "forward" in vars(model.base_model)
    for found, known in zip(states(wrapped, copies), expected, strict=True):
        torch.testing.assert_close(found, known, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("copies", [1, 2])
@pytest.mark.parametrize("tokens", [1, FEW_TOKENS, FEW_TOKENS + 1])
def test_few_tokens_are_those_among_many(tokens: int, copies: int) -> None:
    wrapped, model = opened(MODELS["llama"])
    model.double()
    assert make_lean(model)
    line, cached = list(range(20)), ModelCache()
    expected = run_line(wrapped, line, ModelCache(), copies=copies)
    run_line(wrapped, line[: 20 - tokens], cached, copies=copies)
    found = run_line(wrapped, line, cached, copies=copies)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_weights_of_one_byte_are_multiplied_together() -> None:
    wrapped, model = opened(MODELS["llama"])
    model.bfloat16()
    quantise(model.base_model)
    expected = states(wrapped, 1)
    assert make_lean(model)
    for found, known in zip(states(wrapped, 1), expected, strict=True):
        assert float((found - known).float().norm() / known.float().norm()) < 0.02


def test_other_calls_go_on_as_before() -> None:
    _, model = opened(MODELS["llama"])
    ids = torch.arange(12)[None]
    expected = model(ids, output_hidden_states=True)
    assert make_lean(model)
    found = model(ids, output_hidden_states=True)
    assert torch.equal(found.logits, expected.logits)
    assert len(found.hidden_states) == len(expected.hidden_states)
    assert torch.equal(model(ids, use_cache=True).logits, expected.logits)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated")
def test_a_pair_in_bfloat16_is_prepared_once(tmp_path: Path) -> None:
    pair = pair_of("llama", tmp_path, torch.bfloat16)
    trunk = pair.reference.model.base_model
    assert "forward" not in vars(trunk)
    prepare(pair)
    lean = vars(trunk)["forward"]
    prepare(pair)
    assert vars(trunk)["forward"] is lean


def test_other_families_are_left_alone() -> None:
    model = open_model("tiny:gemma3", dtype="float32").model
    assert not make_lean(model)
    assert "forward" not in vars(model.base_model)
