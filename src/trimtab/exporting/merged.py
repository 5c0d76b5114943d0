"""The host's checkpoint with the head folded into its unembedding."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from trimtab.backends.hf import HFModel, quiet_transformers
from trimtab.errors import ModelError
from trimtab.exporting.linear import Lora
from trimtab.exporting.peft import bias_scale, head_name
from trimtab.store.storage_errors import storage_errors
from trimtab.unembedding import Unembedding

ROWS_AT_ONCE = 8192
"""Rows of the head that are changed at once: the whole difference in float32 may be gigabytes."""


def bias_name(host: HFModel) -> str | None:
    """Name of the bias of the host's head, with which a constant part is exact; None without one.

    Raises:
        ModelError: The head is no module of its own.
    """
    name, head = head_name(host), host.model.get_output_embeddings()
    return f"{name}.bias" if isinstance(getattr(head, "bias", None), Tensor) else None


def write_merged(folder: Path, host: HFModel, lora: Lora, offset: Tensor | None) -> None:
    """Write the host with W + lora_b @ lora_a as its head, untied, and its tokenizer.

    The host itself is left as it was, also where writing fails.

    Args:
        folder: Where to; it exists.
        host: The host.
        lora: The matrix that is added.
        offset: Added to the bias of the host's head, shape [vocab]; None adds nothing.

    Raises:
        ModelError: The head is no module of its own.
        StorageError: The folder cannot be written.
    """
    with _merged(host, lora, offset), storage_errors(folder), quiet_transformers():
        host.model.save_pretrained(folder)
        host.tokenizer.save_pretrained(folder)


def read_merged(folder: Path, host: HFModel) -> Unembedding:
    """Read back the unembedding of what `write_merged` wrote.

    Raises:
        ModelError: The checkpoint lacks its head: transformers left it out as tied.
    """
    names = {f"{head_name(host)}.weight", bias_name(host)}
    found: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            held = set(file.keys())
            found |= {name: file.get_tensor(name) for name in names & held if name}
    weight = found.get(f"{head_name(host)}.weight")
    if weight is None:
        raise ModelError(
            f"transformers saves {host.ref} without a head of its own, even untied",
            hint="use --to peft or --to onnx",
        )
    bias = found.get(bias_name(host) or "")
    scale = host.unembedding.scale
    return Unembedding(weight, bias, scale)


@contextmanager
def _merged(host: HFModel, lora: Lora, offset: Tensor | None) -> Iterator[None]:
    """Give the live model another head inside, and its own one back."""
    head_name(host)
    model: Any = host.model
    head = model.get_output_embeddings()
    configs = {id(c): c for c in (model.config, model.config.get_text_config(decoder=True))}
    ties = [(config, config.tie_word_embeddings) for config in configs.values()]
    kept = head.weight
    bias, kept_bias = head.bias, None
    try:
        head.weight = nn.Parameter(_added(kept.detach(), lora), requires_grad=False)
        for config, _ in ties:
            config.tie_word_embeddings = False
        if offset is not None and bias is not None:
            kept_bias = bias.detach().clone()
            with torch.no_grad():
                bias += (offset / bias_scale(host)).to(bias)
        yield
    finally:
        head.weight = kept
        for config, tie in ties:
            config.tie_word_embeddings = tie
        if bias is not None and kept_bias is not None:
            with torch.no_grad():
                bias.copy_(kept_bias)


def _added(weight: Tensor, lora: Lora) -> Tensor:
    merged = torch.empty_like(weight)
    lora_a = lora.lora_a.to(weight.device)
    for start in range(0, len(weight), ROWS_AT_ONCE):
        rows = slice(start, start + ROWS_AT_ONCE)
        change = lora.lora_b[rows].to(weight.device) @ lora_a
        merged[rows] = (weight[rows].float() + change).to(weight.dtype)
    return merged
