"""A linear layer and the LoRA beside it as one step of training, forward and back."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, final

import torch
from torch import Tensor, nn

from trimtab.light_peft import LoraLinear


@final
class LoraPaths:
    """The LoRA layers of a model in training, computed with fewer passes over activations.

    PEFT's layers scale, add and (in mixed precision) convert activations in steps of their own,
    each of which is kept for the way back. Here a product adds to what another has left. The
    results are the same up to rounding.
    """

    def __init__(self, model: nn.Module, arithmetic: torch.dtype) -> None:
        """Find the layers: plain ones, with one LoRA and no dropout; others stay as they are.

        Args:
            model: In training.
            arithmetic: Of the products. The frozen weights are kept once more in it where they
                are of another; mixed precision would make as large a copy in every step.
        """
        self._forwards = [
            (layer, _forward(layer, arithmetic)) for layer in model.modules() if _is_plain(layer)
        ]

    @contextmanager
    def used(self) -> Iterator[None]:
        """Let the layers be computed so inside the context; gradients also flow after it.

        Not with gradient checkpointing, which would compute them again outside it.
        """
        try:
            for layer, forward in self._forwards:
                vars(layer)["forward"] = forward
            yield
        finally:
            for layer, _ in self._forwards:
                vars(layer).pop("forward", None)


def _is_plain(layer: nn.Module) -> bool:
    if not isinstance(layer, LoraLinear) or type(layer.get_base_layer()) is not nn.Linear:
        return False
    if "forward" in vars(layer):
        return False
    base, dropouts = layer.get_base_layer(), layer.lora_dropout.values()
    frozen = not any(parameter.requires_grad for parameter in base.parameters())
    plain = (
        len(layer.lora_A) == 1
        and not layer.lora_variant
        and not layer.lora_bias[next(iter(layer.lora_A))]
    )
    return frozen and plain and all(isinstance(one, nn.Identity) for one in dropouts)


def _forward(layer: Any, arithmetic: torch.dtype) -> Any:
    base, (name,) = layer.get_base_layer(), layer.lora_A
    bias = None if base.bias is None else base.bias.detach().to(arithmetic)
    return partial(
        _applied,
        weight=base.weight.detach().to(arithmetic),
        bias=bias,
        down=layer.lora_A[name].weight,
        up=layer.lora_B[name].weight,
        scale=layer.scaling[name],
    )


def _applied(
    states: Tensor, *, weight: Tensor, bias: Tensor | None, down: Tensor, up: Tensor, scale: float
) -> Tensor:
    result: Any = _Path.apply(states, weight, down, up, scale)
    return result if bias is None else result + bias


class _Path(torch.autograd.Function):
    """states @ weight.T + scale * (states @ down.T) @ up.T, gradients of all but the base.

    Shapes: states [..., in], weight [out, in], down [rank, in], up [out, rank].
    """

    @staticmethod
    def forward(
        ctx: Any,
        states: Tensor,
        weight: Tensor,
        down: Tensor,
        up: Tensor,
        scale: float,
    ) -> Tensor:
        flat = states.reshape(-1, states.shape[-1]).to(weight.dtype)
        own_down, own_up = down.to(weight.dtype), up.to(weight.dtype)
        low = flat @ own_down.T
        out = (flat @ weight.T).addmm_(low, own_up.T, alpha=scale)
        ctx.save_for_backward(flat, low, weight, own_down, own_up)
        ctx.scale, ctx.shape = scale, states.shape
        ctx.dtypes = states.dtype, down.dtype, up.dtype
        return out.view(*states.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        flat, low, weight, down, up = ctx.saved_tensors
        of_states, of_down, of_up = ctx.dtypes
        gradient = gradients[0].reshape(-1, weight.shape[0])
        to_low = (gradient @ up).mul_(ctx.scale)
        to_up = (gradient.T @ low).to(of_up).mul_(ctx.scale)
        to_down = (to_low.T @ flat).to(of_down)
        to_states = None
        if ctx.needs_input_grad[0]:
            to_states = (gradient @ weight).addmm_(to_low, down).view(ctx.shape).to(of_states)
        return to_states, None, to_down, to_up, None
