"""Attention of one new token on a processor, where several queries share each key.

Asked by one query PyTorch's attention in bfloat16 takes two to ten times as long as by all that
share a key together, as if they were tokens (docs/log.md, 2026-11-28). transformers does so where
there is a mask; here it is done where there is none.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    Gemma3TextModel,
    LlamaModel,
    MistralModel,
    PreTrainedModel,
    Qwen2Model,
    Qwen3Model,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

SHARING = (LlamaModel, MistralModel, Qwen2Model, Qwen3Model, Gemma3TextModel)
"""Families that do not ask what their attention is called: others, such as those that attend to a
few keys only, do otherwise under a name that they do not know."""

_NAME = "trimtab"
_USUAL = "sdpa"
_NOT_PLAIN = ("dropout", "position_bias", "cache", "softcap", "output_attentions")


def share_keys(model: PreTrainedModel) -> None:
    """Let a model's attention ask the queries of one token that share keys together.

    Args:
        model: One of this program's own, on a processor, of a family in `SHARING`, that attends by
            PyTorch's own function; others are left as they are.
    """
    usual = model.config._attn_implementation  # pyright: ignore[reportPrivateUsage]
    if type(model.base_model) not in SHARING or model.device.type != "cpu" or usual != _USUAL:
        return
    AttentionInterface.register(_NAME, _attention)
    AttentionMaskInterface.register(_NAME, sdpa_mask)
    model.set_attn_implementation(_NAME)


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **others: Any,
) -> tuple[Tensor, None]:
    """As transformers' `sdpa`, which it is in all cases but the one that this is for."""
    rows, heads, tokens, _ = query.shape
    is_one = tokens == 1 and attention_mask is None and not torch.is_grad_enabled()
    if not is_one or heads == key.shape[1] or not _is_plain(others):
        return sdpa_attention_forward(module, query, key, value, attention_mask, **others)
    asked = query.reshape(rows, key.shape[1], -1, query.shape[-1])
    found = functional.scaled_dot_product_attention(asked, key, value, scale=others.get("scaling"))
    return found.reshape(rows, 1, heads, value.shape[-1]), None


def _is_plain(others: dict[str, Any]) -> bool:
    """Whether nothing is asked for that few families need."""
    asked = (others.get(name) for name in _NOT_PLAIN)
    # A position bias is a tensor, which is neither true nor false.
    return all(isinstance(one, int | float | None) and not one for one in asked)
