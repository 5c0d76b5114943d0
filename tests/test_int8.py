"""Linear layers with weights of one byte, against the same weights written out in full."""

import pytest
import torch
from torch import nn

from trimtab.backends.int8 import COLUMNS, Int8Linear, quantise


def int8_of(layer: nn.Linear) -> Int8Linear:
    return Int8Linear.of(layer.weight, layer.bias)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("states", [1, 3, 4, 9])
def test_a_layer_is_its_rounded_weights(states: int, dtype: torch.dtype, bias: bool) -> None:
    torch.manual_seed(states)
    layer = nn.Linear(3 * COLUMNS, 37, bias=bias).to(dtype)
    ours = int8_of(layer)
    assert ours.weight.dtype is torch.int8
    steps = ours.scales.float()[:, None]
    whole = ours.weight.float() * steps
    # Half a step, and what the scale itself is rounded by.
    room = (0.5 + 127 * torch.finfo(dtype).eps) * steps
    assert ((whole - layer.weight.float()).abs() <= room).all()
    given = torch.randn(2, states, layer.in_features).to(dtype)
    expected = given.double() @ whole.double().T
    if bias:
        expected += layer.bias.double()
    found = ours(given).double()
    assert found.shape == (2, states, 37)
    size = given.double().abs() @ whole.double().abs().T + expected.abs()
    assert ((found - expected).abs() <= 4 * torch.finfo(dtype).eps * size).all()


def test_a_row_of_zeros_stays_one() -> None:
    layer = nn.Linear(COLUMNS, 2, bias=False)
    with torch.no_grad():
        layer.weight[0] = 0.0
    found = int8_of(layer)(torch.ones(1, COLUMNS))
    assert float(found[0, 0]) == 0.0 and found.isfinite().all()


def test_layers_that_do_not_fit_stay_as_they_are() -> None:
    odd = nn.Linear(COLUMNS + 1, 4)
    model = nn.Sequential(nn.Sequential(nn.Linear(COLUMNS, COLUMNS + 1)), odd, nn.LayerNorm(4))
    quantise(model)
    assert isinstance(model[0][0], Int8Linear) and model[1] is odd
    assert model(torch.randn(2, COLUMNS)).shape == (2, 4)


def test_layers_joined_are_those_in_a_row_and_share_their_weights() -> None:
    torch.manual_seed(0)
    layers = [int8_of(nn.Linear(COLUMNS, size).bfloat16()) for size in (5, 3)]
    states = torch.randn(2, COLUMNS).bfloat16()
    expected = [layer(states) for layer in layers]
    joined = Int8Linear.joined(layers)
    for found in (joined(states).split([5, 3], -1), [layer(states) for layer in layers]):
        assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))
    storages = {layer.weight.untyped_storage().data_ptr() for layer in (*layers, joined)}
    assert len(storages) == 1
    plain = int8_of(nn.Linear(COLUMNS, 4, bias=False).bfloat16())
    with pytest.raises(ValueError, match="1 of 2 layers"):
        Int8Linear.joined([layers[0], plain])
