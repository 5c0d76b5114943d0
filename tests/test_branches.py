"""Texts that begin alike, read together: against a pass over each by itself."""

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, MambaConfig, OpenAIGPTConfig, OPTConfig
from transformers.models.auto.configuration_auto import PreTrainedConfig

from trimtab.backends.branches import branch_states
from trimtab.backends.hf import HFModel, adopt_model
from trimtab.backends.open import open_model
from trimtab.errors import InputError

FAMILIES = ("llama", "qwen3", "gemma2", "gemma3", "gpt2")
BRANCHES = ((5, 6, 7), (), (5, 6), (9,), (5, 6, 7))
SIZES = {"vocab_size": 259, "hidden_size": 32, "num_hidden_layers": 2}


def of_config(config: PreTrainedConfig) -> HFModel:
    plain = open_model("tiny:llama", dtype="float32")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    return adopt_model("other", model, plain.tokenizer)


def check(model: HFModel, begin: tuple[int, ...]) -> list[int]:
    """Compare with a pass over each text; gives how many tokens were read together."""
    read: list[int] = []
    body = model.model.base_model
    expected = [model.hidden(torch.tensor([[*begin, *branch]]))[0] for branch in BRANCHES]
    hook = body.register_forward_pre_hook(
        lambda *given: read.append(given[2]["input_ids"].numel()), with_kwargs=True
    )
    found = branch_states(model, begin, BRANCHES)
    hook.remove()
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=2e-5, rtol=2e-5)
    return read


@pytest.mark.parametrize("family", FAMILIES)
def test_branches_have_the_states_of_whole_texts(family: str) -> None:
    model = open_model(f"tiny:{family}", dtype="float32")
    begin = tuple(range(60, 100))
    # Four are distinct, of three tokens at most.
    assert check(model, begin) == [40, 4 * 3]


def test_a_window_shorter_than_the_beginning_is_kept() -> None:
    model = open_model("tiny:gemma3", dtype="float32")
    config = model.model.config
    config.sliding_window = 8
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        windowed = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    assert check(adopt_model("windowed", windowed, model.tokenizer), tuple(range(60, 90)))[0] == 30


def test_learned_positions_go_on_after_the_beginning() -> None:
    config = OPTConfig(
        **SIZES, ffn_dim=64, num_attention_heads=2, word_embed_proj_dim=32, dropout=0.0
    )
    assert check(of_config(config), (5, 60, 61, 62)) == [4, 12]


def test_models_that_keep_more_than_tokens_read_each_text() -> None:
    recurrent = MambaConfig(**SIZES, state_size=8)
    scaled = LlamaConfig(
        **SIZES, intermediate_size=64, num_attention_heads=2, max_position_embeddings=64,
        rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4},
    )  # fmt: skip
    without_cache = OpenAIGPTConfig(
        vocab_size=259, n_embd=32, n_layer=2, n_head=2, resid_pdrop=0.0, embd_pdrop=0.0
    )
    for config in (recurrent, scaled, without_cache):
        assert check(of_config(config), (60, 61, 62)) == [4 * (3 + 3)]


def test_a_text_that_is_too_long_is_refused() -> None:
    model = open_model("tiny:gpt2", dtype="float32")
    assert model.max_tokens is not None
    begin = [60] * (model.max_tokens - 2)
    assert branch_states(model, begin, [(5,), (5, 6)])[1].shape[0] == model.max_tokens
    with pytest.raises(InputError, match="has positions for"):
        branch_states(model, begin, [(5,), (5, 6, 7)])
