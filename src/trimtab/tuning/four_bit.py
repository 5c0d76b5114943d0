"""Linear layers in four bits, beside which a LoRA is trained (QLoRA)."""

from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from trimtab.errors import ModelError, first_line

PACKAGE = "bitsandbytes"

_HINT = "tune it with --method lora"


def check_four_bit(device: str) -> None:
    """Refuse a machine that cannot train over weights of four bits.

    Args:
        device: Where the model is trained: cpu, cuda or another of torch's kinds.

    Raises:
        ModelError: The package is missing, or cannot round a weight there and read it back.
    """
    if find_spec(PACKAGE) is None:
        raise ModelError(
            f"training over weights of four bits needs the package {PACKAGE}, which is not there",
            hint=f"pip install 'trimtab[qlora]', or {_HINT}",
        )
    try:
        layer = _rounded(nn.Linear(64, 2, bias=False), torch.float32, device)
        layer(torch.ones(1, 64, device=device))
    except (RuntimeError, AssertionError, ImportError) as error:
        raise ModelError(
            f"{PACKAGE} cannot hold weights in four bits on {device}: {first_line(error)}",
            hint=_HINT,
        ) from error


def hold_in_four_bits(model: PreTrainedModel, arithmetic: torch.dtype, device: str) -> None:
    """Round a model's linear layers to 4-bit NormalFloat, and move it to where it is trained.

    The head, which is never tuned, the embedding and the norms go on in float32, as they were read,
    which is how mixed precision holds them. A block of 64 weights shares a scale, and 256 scales
    one more: 4.127 bits a weight (Dettmers et al. 2023, QLoRA, arXiv 2305.14314, section 3). A
    layer is rounded as it arrives on the device, so that no more than one ever lies there whole.

    Args:
        model: On the processor; changed in place.
        arithmetic: Of the products.
        device: Where it goes.

    Raises:
        ModelError: It has no linear layer but its head.
    """
    head = model.get_output_embeddings()
    layers = [
        name
        for name, module in model.named_modules()
        if type(module) is nn.Linear and module is not head
    ]
    if not layers:
        raise ModelError(
            f"{type(model).__name__} has no linear layer that could be held in four bits",
            hint=_HINT,
        )
    for name in layers:
        layer: Any = model.get_submodule(name)
        model.set_submodule(name, _rounded(layer, arithmetic, device))
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.float()
    model.to(device)  # pyright: ignore[reportArgumentType]
    # PEFT asks for this before it puts a LoRA beside such a layer.
    vars(model)["is_loaded_in_4bit"] = True


def _rounded(layer: nn.Linear, arithmetic: torch.dtype, device: str) -> nn.Module:
    # Imported here: the package is in an extra.
    layers: Any = import_module(f"{PACKAGE}.nn")
    # torch says of a layer without a bias that it has one.
    bias: Any = layer.bias
    rounded = layers.Linear4bit(
        layer.in_features,
        layer.out_features,
        bias=bias is not None,
        compute_dtype=arithmetic,
        compress_statistics=True,
        quant_type="nf4",
        device="meta",
    )
    # Else a validation would lay the weights out for a kernel that carries no gradients.
    rounded.support_avx512bf16_for_cpu = False
    rounded.weight = layers.Params4bit(
        layer.weight.detach().to(arithmetic),
        requires_grad=False,
        compress_statistics=True,
        quant_type="nf4",
        module=rounded,
    )
    if bias is not None:
        rounded.bias = nn.Parameter(bias.detach().float(), requires_grad=False)
    rounded.to(device)
    # Of the way there alone; else layer and weight would hold each other, and their memory.
    rounded.weight.module = None
    return rounded
