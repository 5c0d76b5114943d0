"""The layers of Llama-like decoders, for short passes, in as few operations as they need.

A pass of one token through a small model takes longer to start its operations than to compute
them: transformers' layers start some sixty each, for the same that can be had from twenty.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import Cache, LlamaModel, MistralModel, PreTrainedModel, Qwen2Model, Qwen3Model
from transformers.modeling_outputs import BaseModelOutputWithPast

from trimtab.backends.int8 import Int8Linear
from trimtab.carriers.second_row import SecondRow, SecondRows

LEAN = (LlamaModel, MistralModel, Qwen2Model, Qwen3Model)
"""Decoders of one kind: two norms and two additions a layer, gated linear units, rotated keys."""

FEW_TOKENS = 4
"""New tokens of which queries that share keys are asked as if they were tokens: PyTorch's attention
in bfloat16 then takes a third of the time for one, less of a gain for more, and none for eight
(docs/log.md, 2026-11-28)."""

_TAKEN = {"input_ids", "position_ids", "attention_mask", "past_key_values", "use_cache"}


def make_lean(model: PreTrainedModel) -> bool:
    """Let a model's trunk compute passes with a key-value cache and a mask in fewer operations.

    Other calls, such as those that ask for all hidden states, go on as before. Scores are the same
    up to rounding. Layers with weights of one byte that read the same states become one.

    Args:
        model: One of this program's own, on a processor: elsewhere a mask and shared keys lead
            PyTorch's attention to a slower way. Its trunk is changed in place.

    Returns:
        Whether it is of a kind that this can do; others are left as they are.
    """
    trunk: Any = model.base_model
    if type(trunk) not in LEAN or trunk.device.type != "cpu":
        return False
    # Layers on several devices have hooks that move what they are given.
    if any(hasattr(module, "_hf_hook") for module in trunk.modules()):
        return False
    layers = [_LeanLayer(layer) for layer in trunk.layers]
    vars(trunk)["forward"] = partial(_forward, trunk, type(trunk).forward, layers)
    return True


def make_usual(model: PreTrainedModel) -> None:
    """Let a model's trunk compute as before `make_lean`."""
    vars(model.base_model).pop("forward", None)


def _forward(
    trunk: Any, usual: Any, layers: Sequence["_LeanLayer"], *args: Any, **given: Any
) -> Any:
    mask: Any = given.get("attention_mask")
    cache: Any = given.get("past_key_values")
    is_taken = not args and given.keys() == _TAKEN and isinstance(cache, Cache)
    if not is_taken or mask is None or torch.is_grad_enabled():
        return usual(trunk, *args, **given)
    states = trunk.embed_tokens(given["input_ids"])
    cos, sin = trunk.rotary_emb(states, given["position_ids"])
    # rotate_half(x) is x rolled by half its size, the first half of it with the sign changed.
    half = sin.shape[-1] // 2
    rotation = cos[:, :, None], torch.cat([-sin[..., :half], sin[..., half:]], -1)[:, :, None]
    kinds = {layer.kind for layer in layers}
    masks: Any = mask if isinstance(mask, Mapping) else dict.fromkeys(kinds, mask)
    if states.shape[1] <= FEW_TOKENS:
        groups = layers[0].groups
        masks = {kind: masks[kind].repeat(1, 1, groups, 1) for kind in kinds}
    for layer in layers:
        states = layer.after(states, rotation, masks[layer.kind], cache)
    last = _normed(states, _norm(trunk.norm))
    return BaseModelOutputWithPast(last_hidden_state=last, past_key_values=cache)


@final
class _LeanLayer:
    """One layer, whose parts are found once."""

    def __init__(self, layer: Any) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        self.kind: str = getattr(attention, "layer_type", None) or "full_attention"
        self._number: int = attention.layer_idx
        self._size: int = attention.head_dim
        self.groups: int = attention.num_key_value_groups
        self._scale: float = attention.scaling
        self._into = _Together([attention.q_proj, attention.k_proj, attention.v_proj])
        self._norms = [
            None if norm is None else _norm(norm)
            for norm in (getattr(attention, "q_norm", None), getattr(attention, "k_norm", None))
        ]
        self._out: nn.Module = attention.o_proj
        self._gate_up, self._down, self._act = (
            _Together([mlp.gate_proj, mlp.up_proj]),
            mlp.down_proj,
            mlp.act_fn,
        )
        self._first = _norm(layer.input_layernorm)
        self._second = _norm(layer.post_attention_layernorm)

    def after(
        self, states: Tensor, rotation: tuple[Tensor, Tensor], mask: Tensor, cache: Cache
    ) -> Tensor:
        """States after the layer, shape [rows, tokens, hidden]; the cache gets the new keys.

        A mask of `groups` times as many rows as tokens asks queries that share keys as one.
        """
        states = states + self._attention(_normed(states, self._first), rotation, mask, cache)
        gate, up = self._gate_up(_normed(states, self._second))
        return states + self._down(self._act(gate).mul_(up))

    def _attention(
        self, states: Tensor, rotation: tuple[Tensor, Tensor], mask: Tensor, cache: Cache
    ) -> Tensor:
        shape = (*states.shape[:2], -1, self._size)
        queries, keys, values = (part.view(shape) for part in self._into(states))
        queries, keys = (
            _rotated(part if norm is None else _normed(part, norm), rotation).transpose(1, 2)
            for part, norm in zip((queries, keys), self._norms, strict=True)
        )
        keys, values = cache.update(keys, values.transpose(1, 2), self._number)
        rows, heads, tokens, size = queries.shape
        if mask.shape[2] > tokens:
            queries = queries.reshape(rows, -1, self.groups * tokens, size)
        is_shared = queries.shape[1] > keys.shape[1]
        found = functional.scaled_dot_product_attention(
            queries, keys, values, mask, scale=self._scale, enable_gqa=is_shared
        )
        return self._out(found.view(rows, heads, tokens, size).transpose(1, 2).flatten(2))


@final
class _Together:
    """Linear layers that read the same states."""

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        small = [layer for layer in layers if isinstance(layer, Int8Linear)]
        self._layers = layers
        self._sizes = [len(layer.weight) for layer in small]
        self._one = Int8Linear.joined(small) if len(small) == len(layers) else None
        self._rows: tuple[Sequence[SecondRow], SecondRows] | None = None

    def __call__(self, states: Tensor) -> Sequence[Tensor]:
        if self._one is not None:
            return self._one(states).split(self._sizes, -1)
        now = [vars(layer).get("forward") for layer in self._layers]
        rows = [forward for forward in now if isinstance(forward, SecondRow)]
        if len(rows) < len(now):
            return [layer(states) for layer in self._layers]
        if self._rows is None or rows != self._rows[0]:
            self._rows = rows, SecondRows(rows)
        return self._rows[1](states)


def _norm(module: Any) -> tuple[Tensor, float]:
    return module.weight, module.variance_epsilon


def _normed(states: Tensor, norm: tuple[Tensor, float]) -> Tensor:
    weight, least = norm
    return functional.rms_norm(states, weight.shape, weight, least)


def _rotated(part: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate queries or keys, shape [rows, tokens, heads, size]."""
    cos, signed_sin = rotation
    return torch.addcmul(part * cos, part.roll(part.shape[-1] // 2, -1), signed_sin)
