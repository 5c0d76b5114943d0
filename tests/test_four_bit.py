"""A LoRA over a base in four bits is trained as one over that base's rounded weights is."""

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from trimtab.backends.open import open_model
from trimtab.backends.pair import open_pair
from trimtab.config import RecordConfig, TuneConfig
from trimtab.errors import ModelError
from trimtab.record import record
from trimtab.tune import tune
from trimtab.tuning.four_bit import check_four_bit, hold_in_four_bits

LLAMA = "tiny:llama?hidden=64&layers=2"
LORA = "lora/adapter_model.safetensors"

# The 16 values of NF4: Dettmers et al. 2023, appendix E.
NORMAL_FLOAT = torch.tensor(
    [
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
        *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
        *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
        *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    ]
)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    for n in range(8):
        lines = (f"pub fn add{n}_{i}(a: u32) u32 {{ return a + {i}; }}\n" for i in range(6))
        (folder / f"{n}.zig").write_text("".join(lines))
    return folder


def configuration(corpus: Path, out: Path, **changes: object) -> TuneConfig:
    settings: dict[str, object] = {
        "model": LLAMA,
        "method": "qlora",
        "data": (str(corpus),),
        "out": out,
        "learning_rate": 0.01,
        "window_tokens": 32,
        "batch_windows": 8,
        "validation_tokens": 256,
        "dtype": "float32",
    }
    return TuneConfig.model_validate(settings | changes)


def rounded_by_hand(weight: Tensor) -> Tensor:
    """NF4 with exact scales: the nearest of 16 values times the largest of each 64 weights."""
    blocks = weight.float().reshape(-1, 64)
    scales = blocks.abs().amax(1, keepdim=True)
    nearest = (blocks / scales)[..., None].sub(NORMAL_FLOAT).abs().argmin(-1)
    return (NORMAL_FLOAT[nearest] * scales).view_as(weight)


def weights_of(layer: Any) -> Tensor:
    """What a layer in four bits multiplies with."""
    return layer(torch.eye(layer.in_features)).T.contiguous()


def in_four_bits(ref: str) -> Any:
    model = open_model(ref, dtype="bfloat16", device_map="cpu").model
    hold_in_four_bits(model, torch.float32, "cpu")
    return model


@pytest.mark.parametrize("ref", [LLAMA, "tiny:gemma3?hidden=64&layers=2"])
def test_layers_are_rounded_and_nothing_else(ref: str) -> None:
    before: Any = open_model(ref, dtype="bfloat16", device_map="cpu").model
    after = in_four_bits(ref)
    head = after.get_output_embeddings()
    assert type(head) is nn.Linear and head.weight.dtype == torch.float32
    seen = 0
    for name, module in before.named_modules():
        if type(module) is not nn.Linear:
            continue
        expected = module.weight.detach().float()
        if module is before.get_output_embeddings():
            assert torch.equal(head.weight, expected)
            continue
        layer, seen = after.get_submodule(name), seen + 1
        assert layer.weight.numel() * layer.weight.element_size() == expected.numel() // 2
        assert layer.weight.module is None
        assert layer.bias is None
        by_hand = rounded_by_hand(expected)
        # Scales are rounded to 8 bits, 256 together: a hundredth of the largest is far more.
        assert (weights_of(layer) - by_hand).abs().max() < 0.01 * expected.abs().max()
        assert 0.01 < (by_hand - expected).norm() / expected.norm() < 0.2
    assert seen == 14


def test_biases_stay_as_they_are() -> None:
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        attention_bias=True,
        tie_word_embeddings=False,
    )
    model: Any = LlamaForCausalLM(config).to(torch.bfloat16)
    bias = nn.init.normal_(model.model.layers[0].self_attn.q_proj.bias).detach().float()
    head = model.lm_head.weight.detach().float()
    hold_in_four_bits(model, torch.float32, "cpu")
    layer = model.model.layers[0].self_attn.q_proj
    assert torch.equal(layer(torch.zeros(1, 64))[0], bias)
    assert torch.equal(model.lm_head.weight, head)


def test_it_is_lora_over_the_rounded_weights(corpus: Path, tmp_path: Path) -> None:
    ours = tune(configuration(corpus, tmp_path / "qlora"))
    rounded = in_four_bits(LLAMA)
    base = tmp_path / "base"
    plain = open_model(LLAMA, dtype="float32")
    with torch.no_grad():
        for name, module in list(plain.model.named_modules()):
            if type(module) is nn.Linear and module is not plain.model.get_output_embeddings():
                module.weight.copy_(weights_of(rounded.get_submodule(name)))
            elif isinstance(getattr(module, "weight", None), Tensor):
                module.weight.copy_(rounded.get_submodule(name).weight)
    plain.model.save_pretrained(base)
    plain.tokenizer.save_pretrained(base)
    theirs = tune(configuration(corpus, tmp_path / "lora", method="lora", model=str(base)))
    assert ours.held_out and theirs.held_out
    assert ours.held_out.nats_per_token == pytest.approx(theirs.held_out.nats_per_token, rel=1e-4)
    assert ours.held_out.nats_per_token_after < ours.held_out.nats_per_token_before - 0.1
    expected = load_file(theirs.folder / LORA)
    found = load_file(ours.folder / LORA)
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        assert (found[name] - weight).norm() < 0.02 * weight.norm(), name


def test_it_learns_in_mixed_precision(corpus: Path, tmp_path: Path) -> None:
    done = tune(configuration(corpus, tmp_path / "expert", dtype="bfloat16"))
    assert done.held_out
    assert done.held_out.nats_per_token_after < done.held_out.nats_per_token_before - 0.1


def test_an_interrupted_run_ends_the_same(corpus: Path, tmp_path: Path) -> None:
    whole = tune(configuration(corpus, tmp_path / "whole"))
    config = configuration(corpus, tmp_path / "stopped", checkpoint_every_sec=0)

    @contextmanager
    def stopped(label: str, total: int) -> Iterator[Callable[[int], None]]:
        del total
        told = 0

        def advance(done: int) -> None:
            nonlocal told
            told += done
            if label == "tuning (tokens)" and told >= 600:
                raise KeyboardInterrupt

        yield advance

    with pytest.raises(KeyboardInterrupt):
        tune(config, progress=stopped)
    tune(config)
    assert (config.out / LORA).read_bytes() == (whole.folder / LORA).read_bytes()


def test_its_expert_serves_like_any_other(corpus: Path, tmp_path: Path) -> None:
    expert = tune(configuration(corpus, tmp_path / "expert")).folder
    assert json.loads((expert / "expert.json").read_text())["method"] == "qlora"
    with open_pair(expert, dtype="float32").as_expert() as model:
        ids = torch.tensor(model.encode("pub fn add1_1(a: u32) u32 {"))[None]
        changed = model.hidden(ids)
    assert not torch.allclose(changed, open_model(LLAMA, dtype="float32").hidden(ids), atol=1e-3)
    done = record(RecordConfig(expert=expert, out=tmp_path / "recording", dtype="float32"))
    assert done.read_tokens > 0


def test_without_its_package_it_says_what_to_install(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ModelError, match="bitsandbytes") as error:
        tune(configuration(corpus, tmp_path / "expert"))
    assert "trimtab[qlora]" in error.value.hint
    assert not any(path.is_file() for path in tmp_path.rglob("*"))


def test_a_device_that_cannot_is_named() -> None:
    with pytest.raises(ModelError, match="on meta"):
        check_four_bit("meta")


def test_a_model_without_linear_layers_is_refused() -> None:
    # GPT-2's layers are convolutions of its own.
    model = open_model("tiny:gpt2?hidden=64&layers=1", dtype="bfloat16", device_map="cpu").model
    with pytest.raises(ModelError, match="no linear layer"):
        hold_in_four_bits(model, torch.float32, "cpu")
