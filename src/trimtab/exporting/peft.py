"""A LoRA on the host's head in PEFT's form, as peft, vLLM and SGLang load it."""

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from trimtab.backends.hf import HFModel
from trimtab.errors import ModelError
from trimtab.exporting.linear import Lora
from trimtab.light_peft import LoraConfig, TaskType
from trimtab.store.storage_errors import storage_errors

WEIGHTS_NAME = "adapter_model.safetensors"
"""PEFT's own name for the weights; the configuration beside it is adapter_config.json."""


def write_peft(folder: Path, host: HFModel, lora: Lora, bias: Tensor | None) -> None:
    """Write adapter_config.json and adapter_model.safetensors.

    The scaling alpha / r is 1, so that padding the rank changes nothing.

    Args:
        folder: Where to; it exists.
        host: The host.
        lora: The matrix, padded.
        bias: Added to the head's output, shape [vocab]; None writes none. Only peft reads it.

    Raises:
        ModelError: The head has no name in the model.
        StorageError: The folder cannot be written.
    """
    name = head_name(host)
    settings = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.rank,
        lora_dropout=0.0,
        lora_bias=bias is not None,
        target_modules=[name],
        base_model_name_or_path=host.ref,
        task_type=TaskType.SEQ_2_SEQ_LM if host.is_encoder_decoder else TaskType.CAUSAL_LM,
        inference_mode=True,
    )
    with storage_errors(folder):
        settings.save_pretrained(str(folder))
        save_file(_named(name, lora, bias), folder / WEIGHTS_NAME, metadata={"format": "pt"})


def read_peft(folder: Path, host: HFModel) -> tuple[Lora, Tensor | None]:
    """Read back what `write_peft` wrote: the matrix, and the bias if there is one."""
    found, name = load_file(folder / WEIGHTS_NAME), head_name(host)
    prefix = f"base_model.model.{name}"
    lora = Lora(found[f"{prefix}.lora_A.weight"], found[f"{prefix}.lora_B.weight"])
    return lora, found.get(f"{prefix}.lora_B.bias")


def head_name(host: HFModel) -> str:
    """Name of the head inside the host's module tree, for example lm_head.

    Raises:
        ModelError: There is no such module, or it is the input embedding itself.
    """
    head = host.model.get_output_embeddings()
    name = next((name for name, module in host.model.named_modules() if module is head), None)
    if not name or not isinstance(head, torch.nn.Linear):
        raise ModelError(
            f"the head of {host.ref} is no linear module of its own, so that no LoRA can name it",
            hint="use --to onnx",
        )
    return name


def bias_scale(host: HFModel) -> float:
    """What the host multiplies its head's output by, and hence a bias inside the head.

    T5 scales the head's input instead, which a bias does not see.
    """
    config = host.model.config.get_text_config(decoder=True)
    return 1.0 if getattr(config, "scale_decoder_outputs", False) else host.unembedding.scale


def _named(name: str, lora: Lora, bias: Tensor | None) -> dict[str, Tensor]:
    prefix = f"base_model.model.{name}"
    tensors = {f"{prefix}.lora_A.weight": lora.lora_a, f"{prefix}.lora_B.weight": lora.lora_b}
    if bias is not None:
        tensors[f"{prefix}.lora_B.bias"] = bias.contiguous()
    return tensors
