"""A LoRA's path through a layer gives PEFT's own values and gradients, and leaves no trace."""

import warnings
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from trimtab.backends.open import open_model
from trimtab.tuning.lora_path import LoraPaths

RANK = 4
BIASED = "a Llama whose layers have biases, as those of Qwen2 have"


def biased() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        attention_bias=True,
        mlp_bias=True,
    )
    model = LlamaForCausalLM(config)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter)
    return model


def with_lora(ref: str, **settings: Any) -> nn.Module:
    torch.manual_seed(0)
    model: Any = biased() if ref == BIASED else open_model(ref, dtype="float32").model
    config = LoraConfig(
        r=RANK, lora_alpha=3 * RANK, target_modules="all-linear", task_type="CAUSAL_LM", **settings
    )
    # PEFT asks transformers for a property that transformers is about to rename.
    with warnings.catch_warnings(action="ignore"):
        wrapped = get_peft_model(model, config)
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    return wrapped


def logits_and_gradients(
    model: nn.Module, paths: LoraPaths | None, *, mixed: bool = False
) -> tuple[Tensor, dict[str, Tensor]]:
    ids = torch.arange(24).view(2, 12) % 11 + 3
    used = nullcontext() if paths is None else paths.used()
    model.zero_grad()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=mixed), used:
        logits = model(input_ids=ids).logits
    logits.logsumexp(-1).sum().backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return logits.detach(), found


REFS = ["tiny:llama?hidden=32", "tiny:gemma3?hidden=32", BIASED]


def error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("ref", REFS)
def test_the_path_is_pefts(ref: str) -> None:
    model = with_lora(ref).double()
    theirs, their_gradients = logits_and_gradients(model, None)
    ours, our_gradients = logits_and_gradients(model, LoraPaths(model, torch.float64))
    assert error(ours, theirs) < 1e-12
    assert our_gradients.keys() == their_gradients.keys()
    for name, expected in their_gradients.items():
        assert error(our_gradients[name], expected) < 1e-9, name


@pytest.mark.parametrize("ref", REFS)
def test_mixed_precision_is_as_exact_as_pefts(ref: str) -> None:
    model = with_lora(ref)
    exact = logits_and_gradients(model, None)
    theirs = logits_and_gradients(model, None, mixed=True)
    ours = logits_and_gradients(model, LoraPaths(model, torch.bfloat16), mixed=True)
    assert 0 < error(ours[0], exact[0]) < 1.1 * error(theirs[0], exact[0])
    by_name, names = (exact[1], theirs[1], ours[1]), exact[1].keys()
    wanted, peft, here = (torch.cat([one[name].flatten() for name in names]) for one in by_name)
    assert 0 < error(here, wanted) < 1.1 * error(peft, wanted)


def test_layers_are_as_they_were() -> None:
    model = with_lora("tiny:llama?hidden=32&layers=1")
    before = {name: dict(vars(module)) for name, module in model.named_modules()}
    paths = LoraPaths(model, torch.float32)
    changed = []
    with pytest.raises(RuntimeError, match="stopped"), paths.used():
        changed = [n for n, module in model.named_modules() if "forward" in vars(module)]
        raise RuntimeError("stopped")
    assert len(changed) == 7
    assert {n: dict(vars(m)).keys() for n, m in model.named_modules()} == {
        name: found.keys() for name, found in before.items()
    }


@pytest.mark.parametrize(
    ("ref", "settings"),
    [
        ("tiny:gpt2?hidden=32&layers=1", {"fan_in_fan_out": True}),
        ("tiny:llama?hidden=32&layers=1", {"lora_dropout": 0.1}),
        ("tiny:llama?hidden=32&layers=1", {"use_dora": True}),
        ("tiny:llama?hidden=32&layers=1", {"lora_bias": True}),
        ("tiny:llama?hidden=32&layers=1", {"bias": "all"}),
    ],
)
def test_what_is_not_plain_is_left_to_peft(ref: str, settings: dict[str, Any]) -> None:
    model = with_lora(ref, **settings)
    with LoraPaths(model, torch.float32).used():
        changed = [n for n, module in model.named_modules() if "forward" in vars(module)]
    # Llama's layers have no bias, so that a LoRA with biases trained is plain there.
    assert len(changed) == (7 if settings == {"bias": "all"} else 0)
