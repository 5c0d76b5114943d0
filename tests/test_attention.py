"""One token's queries that share keys are asked together, and all else is transformers' own way."""

from typing import Any

import pytest
import torch
from test_lean import MODELS, SIZES
from torch import Tensor
from transformers import (
    DynamicCache,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GPTBigCodeConfig,
    GPTBigCodeForCausalLM,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)

from trimtab.backends.attention import share_keys

SHARING: dict[str, Any] = {name: MODELS[name] for name in ("llama", "mistral", "qwen2", "qwen3")}
SHARING["gemma3"] = lambda: Gemma3ForCausalLM(
    Gemma3TextConfig(**SIZES, head_dim=16, sliding_window=5)
)


def made(make: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    model: PreTrainedModel = make().double().eval()
    return model


def decoded(model: PreTrainedModel, rows: int, mask: Tensor | None) -> list[Tensor]:
    """Logits of a prompt, of four tokens one by one, and of three at once after it."""
    torch.manual_seed(1)
    ids = torch.randint(5, 60, (rows, 16))
    cache, found = DynamicCache(config=model.config), list[Tensor]()
    for start, end in ((0, 9), (9, 10), (10, 11), (11, 12), (12, 13), (13, 16)):
        given: dict[str, Any] = {"past_key_values": cache, "use_cache": True}
        if mask is not None:
            given["attention_mask"] = mask[:, :end]
        with torch.no_grad():
            found.append(model(input_ids=ids[:, start:end], **given).logits)
    return found


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("family", SHARING)
def test_logits_are_those_of_transformers(
    family: str, masked: bool, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = made(SHARING[family])
    mask = torch.ones(rows, 16, dtype=torch.long) if masked else None
    if mask is not None:
        mask[-1, :3] = 0
    expected = decoded(model, rows, mask)
    share_keys(model)
    asked = list[tuple[int, ...]]()
    usual = torch.nn.functional.scaled_dot_product_attention

    def watched(query: Tensor, *others: Any, **options: Any) -> Tensor:
        asked.append(tuple(query.shape))
        return usual(query, *others, **options)

    monkeypatch.setattr("torch.nn.functional.scaled_dot_product_attention", watched)
    for found, known in zip(decoded(model, rows, mask), expected, strict=True):
        torch.testing.assert_close(found, known, rtol=1e-9, atol=1e-9)
    # Two queries share each key: as tokens of their own, beside four heads' of the other passes.
    assert {shape[1] for shape in asked if shape[2] == 2} == {2}


def test_other_families_keep_their_own_way() -> None:
    """A family may ask by name how it attends: DeepSeek's sparse one does."""
    model = made(
        lambda: GPTBigCodeForCausalLM(
            GPTBigCodeConfig(vocab_size=99, n_embd=64, n_layer=2, n_head=4)
        )
    )
    share_keys(model)
    assert model.config._attn_implementation == "sdpa"  # pyright: ignore[reportPrivateUsage]
    eager = made(SHARING["llama"])
    eager.set_attn_implementation("eager")
    share_keys(eager)
    assert eager.config._attn_implementation == "eager"  # pyright: ignore[reportPrivateUsage]


@pytest.mark.parametrize("family", ["gpt2", "t5"])
def test_families_that_share_no_keys_go_on_as_before(family: str) -> None:
    if family == "gpt2":
        model = made(
            lambda: GPT2LMHeadModel(GPT2Config(vocab_size=99, n_embd=64, n_layer=2, n_head=4))
        )
    else:
        sizes: dict[str, Any] = {
            "d_model": 64,
            "d_kv": 16,
            "d_ff": 96,
            "num_layers": 2,
            "num_heads": 4,
            "decoder_start_token_id": 0,
        }
        model = made(lambda: T5ForConditionalGeneration(T5Config(vocab_size=99, **sizes)))
    ids = torch.arange(5, 15)[None]
    options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    expected = model.generate(ids, **options)  # pyright: ignore[reportCallIssue]
    share_keys(model)
    assert torch.equal(model.generate(ids, **options), expected)  # pyright: ignore[reportCallIssue]
