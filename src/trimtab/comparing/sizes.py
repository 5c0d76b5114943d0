"""What training and reading take of a model that is at hand: operations and memory.

Memory is what a training adds to the process that does it.
"""

from typing import Any

from trimtab.backends.hf import HFModel
from trimtab.backends.open import one_device
from trimtab.costing import flops
from trimtab.costing.memory import BF16_BYTES, NF4_BYTES
from trimtab.costing.sheet import Shape

_FLOAT32 = 4
_ADAM = 4
"""Copies of a trained weight in float32: itself, its gradient, two moments."""
_LOGIT_BYTES = 20
"""Of a logit in training: as it is computed and in float32, its log-probability, and the gradients
of all three."""


def shape_of(model: HFModel) -> Shape:
    """Sizes of an open model, as the cost model counts them."""
    config: Any = model.model.config.get_text_config(decoder=True)
    rows, hidden = model.unembedding.weight.shape
    heads = config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    keys = getattr(config, "num_key_value_heads", None) or heads
    embedding: Any = model.model.get_input_embeddings()
    inner = getattr(config, "intermediate_size", None) or getattr(config, "n_inner", None)
    return Shape(
        name=model.ref,
        params=float(sum(weight.numel() for weight in model.model.parameters())),
        layers=config.num_hidden_layers,
        hidden=hidden,
        attention=heads * width,
        key_value=keys * width,
        feed_forward=inner or 4 * hidden,
        vocab=rows,
        tied=embedding.weight is model.unembedding.weight,
        address="",
    )


def reading_flops(shape: Shape, tokens: float, window_tokens: int) -> float:
    """Operations of reading so many tokens in windows, with the logits of each."""
    return tokens * flops.forward_flops(shape, window_tokens / 2)


def lora_flops(shape: Shape, tokens: float, window_tokens: int, rank: int) -> float:
    """Operations of training with LoRA on so many tokens."""
    return tokens * flops.lora_training_flops(shape, window_tokens / 2, rank)


def full_flops(shape: Shape, tokens: float, window_tokens: int) -> float:
    """Operations of training all weights on so many tokens."""
    return tokens * flops.full_training_flops(shape, window_tokens / 2)


def lora_bytes(shape: Shape, rank: int, window_tokens: int, copy_bytes: int) -> float:
    """Memory of `tune` with LoRA: weights in float32, their copies for products, and training.

    Args:
        shape: Sizes of the model.
        rank: Of the LoRA.
        window_tokens: Length of a training window.
        copy_bytes: Of the copy of a weight that mixed precision keeps; 0 without it.
    """
    trained = _FLOAT32 * (_ADAM + 1) * flops.lora_params(shape, rank)
    held = (_FLOAT32 + copy_bytes) * shape.params + trained
    return held + _activations(shape, window_tokens)


def qlora_bytes(shape: Shape, rank: int, window_tokens: int, copy_bytes: int) -> float:
    """The same with QLoRA: layers in 4 bits; what a processor trains is opened there in 16 bits."""
    tables = min((1 if shape.tied else 2) * shape.vocab * shape.hidden, shape.params)
    trained = _FLOAT32 * (_ADAM + 1) * flops.lora_params(shape, rank)
    held = NF4_BYTES * (shape.params - tables) + (_FLOAT32 + copy_bytes) * tables + trained
    opened = BF16_BYTES * shape.params if one_device() == "cpu" else 0.0
    return max(opened, held + _activations(shape, window_tokens))


def full_bytes(shape: Shape, window_tokens: int, copy_bytes: int) -> float:
    """The same with all weights: five times in float32, the best so far among them."""
    held = (_FLOAT32 * (_ADAM + 1) + copy_bytes) * shape.params
    return held + _activations(shape, window_tokens)


def _activations(shape: Shape, window_tokens: int) -> float:
    # No checkpoints between layers, and float32: each layer is whole, at twice 16 bits.
    one_layer = 2.0 * 34.0 * window_tokens * shape.hidden
    return shape.layers * one_layer + _LOGIT_BYTES * float(window_tokens) * shape.vocab
