"""The unembedding of a live transformers model, checked against the model itself."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel

from trimtab.errors import ModelError
from trimtab.unembedding import Unembedding

_PROBE_LOGIT = 40.0


def read_unembedding(model: PreTrainedModel) -> Unembedding:
    """Take the unembedding from a model's head and configuration, as live parameters.

    Args:
        model: A causal or sequence-to-sequence language model.

    Returns:
        Its unembedding; `check_unembedding` says whether nothing was overlooked.

    Raises:
        ModelError: The model has no linear head, or not in memory.
    """
    head = model.get_output_embeddings()
    weight = getattr(head, "weight", None)
    if head is None or not isinstance(weight, Tensor):
        raise ModelError(
            f"{type(model).__name__} has no linear language-model head",
            hint="use a causal or sequence-to-sequence language model",
        )
    if weight.is_meta:
        raise ModelError(
            f"the language-model head of {type(model).__name__} was offloaded to disk, and"
            " steering reads it at each token",
            hint="use a device map that keeps the head in memory, or a smaller host",
        )
    config = model.config.get_text_config(decoder=True)
    return Unembedding(
        weight=weight,
        bias=_bias(model, head),
        scale=_scale(config),
        softcap=_softcap(config),
    )


def load_head(model: PreTrainedModel, folder: Path, dtype: torch.dtype) -> None:
    """Give a model without weights those of its head.

    Args:
        model: A causal language model on the meta device.
        folder: Its checkpoint, in safetensors.
        dtype: Arithmetic of the head.

    Raises:
        KeyError: The checkpoint does not name the head's weights as the model does.
    """
    head: Any = model.get_output_embeddings()
    embedding: Any = model.get_input_embeddings()
    for name in [name for name, _ in head.named_parameters()]:
        found = _stored(folder, f"{_path_of(model, head)}.{name}")
        if found is None and name == "weight" and model.config.tie_word_embeddings:
            found = _stored(folder, f"{_path_of(model, embedding)}.{name}")
        if found is None:
            raise KeyError(f"there is no {name} of the head in {folder}")
        setattr(head, name, nn.Parameter(found.to(dtype), requires_grad=False))


def _path_of(model: nn.Module, part: nn.Module) -> str:
    return next(name for name, module in model.named_modules() if module is part)


def _stored(folder: Path, name: str) -> Tensor | None:
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            if name in file.keys():
                return file.get_tensor(name)
    return None


def _bias(model: PreTrainedModel, head: nn.Module) -> Tensor | None:
    parts = [getattr(head, "bias", None), getattr(model, "final_logits_bias", None)]
    present = [part.reshape(-1) for part in parts if isinstance(part, Tensor)]
    return sum(present[1:], start=present[0]) if present else None


def _scale(config: Any) -> float:
    scale = 1.0
    if getattr(config, "scale_decoder_outputs", False):
        scale *= config.d_model**-0.5
    for name, power in (("logits_scaling", -1), ("logit_scale", 1), ("output_multiplier", 1)):
        value = getattr(config, name, None)
        if isinstance(value, int | float):
            scale *= float(value) ** power
    return scale


def _softcap(config: Any) -> float | None:
    # As Gemma 2, RecurrentGemma and xLSTM call it.
    names = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
    return next((cap for name in names if (cap := getattr(config, name, None))), None)


@torch.no_grad()
def check_unembedding(
    model: PreTrainedModel,
    unembedding: Unembedding,
    states_and_logits: Callable[[], tuple[Tensor, Tensor]],
    *,
    ref: str,
) -> None:
    """Make sure that the unembedding of a model's hidden states gives the model's own logits.

    The head's input is enlarged during the check until logits reach 40, so that a soft-cap
    that small random weights would not show cannot be overlooked.

    Args:
        model: The model that the unembedding was read from.
        unembedding: What `read_unembedding` found.
        states_and_logits: Runs the model on a few tokens: final hidden states and own logits.
        ref: Name of the model in the error.

    Raises:
        ModelError: The two differ by more than the rounding of the model's arithmetic, or the
            logits are not finite.
    """
    hidden, logits = states_and_logits()
    if not logits.isfinite().all():
        raise ModelError(
            f"{ref} gives logits that are not finite numbers",
            hint="its weights are broken, or too large for this arithmetic: use another copy, or"
            " --dtype float32",
        )
    _compare(unembedding.logits(hidden), logits, ref)
    factor = _PROBE_LOGIT / max(float(logits.abs().max()), 1e-6)
    head: Any = model.get_output_embeddings()
    handle = head.register_forward_pre_hook(
        lambda _module, inputs: (inputs[0] * factor, *inputs[1:])
    )
    try:
        _, enlarged = states_and_logits()
    finally:
        handle.remove()
    _compare(unembedding.logits(hidden * factor), enlarged, ref)


def _compare(ours: Tensor, own: Tensor, ref: str) -> None:
    same_shape = ours.shape == own.shape
    tolerance = 8 * torch.finfo(ours.dtype).eps * max(float(own.abs().max()), 1e-6)
    own = own.to(ours.device)
    worst = float((ours.float() - own.float()).abs().max()) if same_shape else float("inf")
    if not worst <= tolerance:
        raise ModelError(
            f"the logits of {ref} cannot be told from its hidden states: they differ by up to"
            f" {worst:.3g} (expected at most {tolerance:.3g}), so its head does something unknown",
            hint="use a model of a supported family: Llama, Qwen, Gemma, GPT-2, Phi, Granite,"
            " Cohere, Mistral, T5 or Marian",
        )
