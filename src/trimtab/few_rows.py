"""Products of a few states with a weight on a processor, as decoding steps and drafted blocks ask.

A processor's library has a fast way to multiply a matrix by one vector, bound by reading the
matrix from memory, and one for many vectors, which packs the matrix first. Which of them it takes
for a few depends on the order of the factors and on the processor. Where it packs, a few states
times a transposed weight take two to three times as long as one; the weight times as few columns
is then read as it lies, and two to four columns cost what one does.
"""

from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

FEW_ROWS = {"AVX2": range(2, 65), "AVX512": range(16, 49)}
"""How many states are computed with their factors exchanged, by the processor's instructions.

With AVX2 (seen on an AMD EPYC) that takes half as long for two to four states, and less is won
where there are more; with AVX-512 (seen on an Intel Xeon) up to three states cost one anyway, and
16 to 48 take 0.7 times as long (bench/results/2026-11-26-few-rows.json and -avx512.json). A rule
and no trial on the spot, after which no two runs would round alike."""

FEW_BFLOAT16_ROWS = range(1, 9)
"""The same in bfloat16 on a processor with tile registers (AMX).

One state to eight then take 0.5 to 1.0 times as long, the wider the weight the less; from twelve on
narrow weights lose (bench/results/2026-11-27-few-rows-bfloat16.json)."""

LEAST_WEIGHTS = 2**16
"""Smaller weights lie in a cache, however they are read."""

_NONE = range(0)


def product(states: Tensor, weight: Tensor) -> Tensor:
    """States @ weight.T, up to rounding.

    Args:
        states: Shape [rows, columns].
        weight: Shape [outputs, columns], as a linear layer keeps it.

    Returns:
        Shape [rows, outputs].
    """
    if not _is_few(len(states), states, weight):
        return states @ weight.T
    return exchanged(states, weight)


def hasten(model: nn.Module) -> None:
    """Let a model's linear layers compute few states so, wherever nothing is learnt from them.

    Args:
        model: A model of this program's own, whose layers are changed in place; its weights stay.
    """
    for module in model.modules():
        if type(module) is nn.Linear and module.weight.numel() >= LEAST_WEIGHTS:
            vars(module)["forward"] = partial(_linear, module)


def exchanged(states: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The same with the factors exchanged, whatever is faster, and a bias of shape [outputs]."""
    rows = len(states)
    if rows == 1:
        state = states[0]
        one = torch.mv(weight, state) if bias is None else torch.addmv(bias, weight, state)
        return one[None]
    # Kernels are made for 4 and for 16 columns.
    filled = 4 if rows == 3 else 16 if 8 < rows < 16 else rows
    if filled > rows:
        states = functional.pad(states, (0, 0, 0, filled - rows))
    # Added inside, where sums are not rounded yet.
    columns = weight @ states.T if bias is None else torch.addmm(bias[:, None], weight, states.T)
    return columns[:, :rows].T.contiguous()


def _linear(layer: nn.Linear, states: Tensor) -> Tensor:
    weight: Tensor = layer.weight
    # torch says of a layer without a bias that it has one.
    bias: Any = layer.bias
    if not _is_few(states.numel() // max(1, states.shape[-1]), states, weight):
        return functional.linear(states, weight, bias)
    rows = states.reshape(-1, states.shape[-1])
    return exchanged(rows, weight, bias).reshape(*states.shape[:-1], len(weight))


def _is_few(rows: int, states: Tensor, weight: Tensor) -> bool:
    if weight.device.type != "cpu" or weight.numel() < LEAST_WEIGHTS:
        return False
    is_followed = torch.is_grad_enabled() and (states.requires_grad or weight.requires_grad)
    is_one_dtype = weight.dtype is states.dtype
    return rows in _few(weight.dtype) and is_one_dtype and not is_followed


@cache
def _few(dtype: torch.dtype) -> range:
    capability = torch.backends.cpu.get_cpu_capability()
    if dtype is torch.float32:
        return FEW_ROWS.get(capability, _NONE)
    has_tiles = capability == "AVX512" and torch.cpu.get_capabilities().get("amx_bf16")
    return FEW_BFLOAT16_ROWS if dtype is torch.bfloat16 and has_tiles else _NONE
