"""Products of a few states, against the same in double precision."""

import copy
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from trimtab import few_rows
from trimtab.backends.open import open_model
from trimtab.few_rows import hasten, product

SHIPPED = few_rows._few
FEW = {torch.float32: range(2, 65), torch.bfloat16: range(1, 9), torch.float16: range(0)}


@pytest.fixture(autouse=True, scope="module")
def everywhere() -> Iterator[None]:
    """Factors are exchanged on every processor and at every size, so that it is tested on each."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(few_rows, "_few", lambda dtype: FEW[dtype])
        patch.setattr(few_rows, "LEAST_WEIGHTS", 1)
        yield


@given(st.integers(0, 66), st.integers(1, 40), st.integers(1, 40), st.integers(0, 9))
def test_a_product_is_the_product(rows: int, columns: int, outputs: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    states = torch.randn(rows, columns, generator=generator)
    weight = torch.randn(outputs, columns, generator=generator)
    found = product(states, weight)
    assert found.shape == (rows, outputs) and found.is_contiguous()
    expected = states.double() @ weight.double().T
    torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("shape", [(7,), (1, 7), (3, 7), (1, 2, 7), (2, 9, 7), (0, 7), (1, 80, 7)])
@pytest.mark.parametrize("bias", [True, False])
def test_a_layer_computes_what_it_did(shape: tuple[int, ...], bias: bool) -> None:
    plain = nn.Linear(7, 5, bias=bias)
    hastened = copy.deepcopy(plain)
    hasten(hastened)
    states = torch.randn(shape)
    with torch.no_grad():
        torch.testing.assert_close(hastened(states), plain(states))
    # What is learnt goes the way that can be followed back, and the weights are the layer's own.
    states.requires_grad_()
    expected = torch.autograd.grad(plain(states).square().sum(), (states, plain.weight))
    found = torch.autograd.grad(hastened(states).square().sum(), (states, hastened.weight))
    torch.testing.assert_close(found, expected)


def test_a_copy_has_layers_of_its_own() -> None:
    first = nn.Linear(4, 4)
    hasten(first)
    second = copy.deepcopy(first)
    with torch.no_grad():
        second.weight.zero_()
        assert second(torch.ones(2, 4)).equal(second.bias.expand(2, -1))
        assert not first(torch.ones(2, 4)).equal(first.bias.expand(2, -1))


def test_other_arithmetic_is_left_as_it_is() -> None:
    plain = nn.Linear(8, 8).half()
    hastened = copy.deepcopy(plain)
    hasten(hastened)
    states = torch.randn(3, 8).half()
    with torch.no_grad():
        assert torch.equal(hastened(states), plain(states))


@pytest.mark.parametrize("rows", range(1, 9))
def test_a_bias_is_added_before_bfloat16_is_rounded(rows: int) -> None:
    layer = nn.Linear(300, 40).bfloat16()
    hasten(layer)
    states = torch.randn(rows, 300, generator=torch.Generator().manual_seed(rows)).bfloat16()
    with torch.no_grad():
        # It cancels most of the first state's product.
        layer.bias.copy_(-(layer.weight.double() @ states[0].double()))
        found = layer(states)
        expected = states.double() @ layer.weight.double().T + layer.bias.double()
    torch.testing.assert_close(found.double(), expected, atol=1e-4, rtol=2**-8)


SELECTED = [
    ("AVX2", {}, {torch.float32: few_rows.FEW_ROWS["AVX2"]}),
    ("AVX512", {}, {torch.float32: few_rows.FEW_ROWS["AVX512"]}),
    (
        "AVX512",
        {"amx_bf16": True},
        {
            torch.float32: few_rows.FEW_ROWS["AVX512"],
            torch.bfloat16: few_rows.FEW_BFLOAT16_ROWS,
        },
    ),
    # A processor that is told to do with less.
    ("AVX2", {"amx_bf16": True}, {torch.float32: few_rows.FEW_ROWS["AVX2"]}),
    ("DEFAULT", {}, {}),
]


@pytest.mark.parametrize(("capability", "has", "expected"), SELECTED)
def test_the_processor_decides_what_is_few(
    capability: str,
    has: dict[str, bool],
    expected: dict[torch.dtype, range],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: has)
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        assert SHIPPED.__wrapped__(dtype) == expected.get(dtype, range(0))


@given(st.integers(0, 12), st.integers(1, 300), st.integers(1, 40), st.integers(0, 9))
def test_bfloat16_is_rounded_once(rows: int, columns: int, outputs: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    states = torch.randn(rows, columns, generator=generator).bfloat16()
    weight = torch.randn(outputs, columns, generator=generator).bfloat16()
    found = product(states, weight)
    assert found.shape == (rows, outputs) and found.is_contiguous()
    expected = states.double() @ weight.double().T
    # Sums are kept in float32, where the terms may cancel; then comes one rounding.
    torch.testing.assert_close(found.double(), expected, atol=1e-4, rtol=2**-8)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "t5"])
def test_an_opened_model_says_the_same(family: str) -> None:
    model = open_model(f"tiny:{family}", dtype="float32")
    for tokens in (1, 3, 12):
        ids = torch.arange(3, 3 + tokens)[None]
        found = model.logits(ids)
        for module in model.model.modules():
            vars(module).pop("forward", None)
        torch.testing.assert_close(found, model.logits(ids), atol=1e-5, rtol=1e-5)
        hasten(model.model)
