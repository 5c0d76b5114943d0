"""A LoRA for the second of two rows, layer by layer and beside several at once."""

import pytest
import torch
from torch import nn

from trimtab.carriers.second_row import SecondRow, SecondRows


def layers(dtype: torch.dtype, path: torch.dtype) -> list[SecondRow]:
    torch.manual_seed(0)
    made = []
    for outputs, rank in ((12, 4), (5, 4), (7, 2)):
        down, up = torch.randn(8, rank, dtype=path), torch.randn(rank, outputs, dtype=path)
        made.append(SecondRow(nn.Linear(8, outputs).to(dtype), down, up))
    return made


@pytest.mark.parametrize(
    ("dtype", "path", "error"),
    [
        (torch.float64, torch.float64, 1e-12),
        (torch.float32, torch.float32, 1e-5),
        (torch.bfloat16, torch.float32, 0.2),
    ],
)
@torch.no_grad()
def test_the_second_row_gets_the_path_and_the_first_does_not(
    dtype: torch.dtype, path: torch.dtype, error: float
) -> None:
    made = layers(dtype, path)
    states = torch.randn(2, 3, 8, dtype=dtype)
    together = SecondRows(made)(states)
    for layer, joined in zip(made, together, strict=True):
        plain = layer.plain(states)
        expected = plain.double().clone()
        expected[1] += states[1].double() @ layer.down.double() @ layer.up.double()
        for found in (layer(states), joined):
            assert torch.equal(found[0], plain[0])
            assert found.dtype is dtype and (found.double() - expected).abs().max() <= error
            assert (found[1] != plain[1]).any()


def test_other_shapes_are_refused() -> None:
    made = layers(torch.float32, torch.float32)
    for shape in ((3, 2, 8), (2, 8), (1, 2, 8)):
        with pytest.raises(ValueError, match="a layer was given states of shape"):
            made[0](torch.zeros(shape))
        with pytest.raises(ValueError, match="a layer was given states of shape"):
            SecondRows(made)(torch.zeros(shape))
