"""Linear layers with weights of one byte, for passes of a few states on a processor.

One state times a weight takes as long as reading the weight, so half as many bytes take half as
long. PyTorch has the product under a name of its own (`_weight_int8pack_mm`), which is what
torchao's weight-only quantisation compiles to; without a compiler torchao multiplies by weights
that it first writes out in full.
"""

from collections.abc import Sequence
from typing import Any, TypeGuard, final

import torch
from torch import Tensor, nn

COLUMNS = 32
"""The product reads weights in steps of as many columns, and beyond a row's end if they do not fit.
"""

ROUNDED_ROWS = 16_384
"""Rows of a weight that are rounded at once: in float32 they take several times their room."""

LARGEST = 127
"""Integers lie within this of zero."""


@final
class Int8Linear(nn.Module):
    """A linear layer in inference: y = (x W'^T) * scales + bias, W' in whole numbers."""

    weight: Tensor
    scales: Tensor
    bias: Tensor | None

    def __init__(self, weight: Tensor, scales: Tensor, bias: Tensor | None) -> None:
        """Take what has been rounded.

        Args:
            weight: Whole numbers, shape [outputs, features].
            scales: What each row is multiplied by, shape [outputs].
            bias: Shape [outputs], if there is one.
        """
        super().__init__()
        self.register_buffer("weight", weight)
        self.register_buffer("scales", scales)
        self.register_buffer("bias", bias)

    @staticmethod
    def of(weight: Tensor, bias: Tensor | None = None) -> "Int8Linear":
        """Round each row of a weight to 255 steps between its largest values.

        Args:
            weight: Shape [outputs, features], with `COLUMNS` features or a multiple.
            bias: Shape [outputs], if there is one.
        """
        parts = [_rounded(rows) for rows in weight.detach().split(ROUNDED_ROWS)]
        whole, scales = map(torch.cat, zip(*parts, strict=True))
        return Int8Linear(whole, scales.to(weight.dtype), None if bias is None else bias.detach())

    @staticmethod
    def joined(layers: Sequence["Int8Linear"]) -> "Int8Linear":
        """One in the place of several that read the same states: their outputs in a row.

        Args:
            layers: All with a bias, or none; their weights become parts of the one's.
        """
        biases = [layer.bias for layer in layers if layer.bias is not None]
        if len(biases) not in (0, len(layers)):
            raise ValueError(f"{len(biases)} of {len(layers)} layers have a bias")
        weight = torch.cat([layer.weight for layer in layers])
        scales = torch.cat([layer.scales for layer in layers])
        sizes = [len(layer.weight) for layer in layers]
        parts = zip(layers, weight.split(sizes), scales.split(sizes), strict=True)
        for layer, own_weight, own_scales in parts:
            layer.weight, layer.scales = own_weight, own_scales
        return Int8Linear(weight, scales, torch.cat(biases) if biases else None)

    def forward(self, states: Tensor) -> Tensor:
        """Apply it, shape [..., features] to [..., outputs]."""
        flat = states.reshape(-1, states.shape[-1])
        out = torch.ops.aten._weight_int8pack_mm(flat, self.weight, self.scales)
        if self.bias is not None:
            out += self.bias
        return out.reshape(*states.shape[:-1], -1)


def _rounded(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Whole numbers, and what each row of them is multiplied by."""
    rows = rows.float()
    scales = rows.abs().amax(1).clamp_min(torch.finfo(torch.float32).tiny) / LARGEST
    return (rows / scales[:, None]).round().to(torch.int8), scales


def quantise(model: nn.Module) -> None:
    """Put `Int8Linear` in the place of a model's linear layers, where that is possible.

    Args:
        model: A copy of this program's own, on a processor; changed in place.
    """
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if is_rounded(child):
                # torch says of a layer without a bias that it has one.
                bias: Any = child.bias
                setattr(parent, name, Int8Linear.of(child.weight, bias))


def is_rounded(module: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether `quantise` puts another in a layer's place."""
    return type(module) is nn.Linear and is_possible(module.weight)


def is_possible(weight: Tensor) -> bool:
    """Whether there is a product with this weight in numbers of one byte."""
    return hasattr(torch.ops.aten, "_weight_int8pack_mm") and weight.shape[1] % COLUMNS == 0
