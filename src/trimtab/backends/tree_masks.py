"""Which tokens those of a tree attend to, as attention masks."""

import torch
from torch import Tensor

from trimtab.backends.hf import HFModel


def masks_of(model: HFModel, visible: Tensor, copies: int) -> Tensor | dict[str, Tensor]:
    """What each layer adds to its attention scores; by type of layer, where they differ in that.

    transformers takes a mask of this shape as it is, and would let the layers that have a sliding
    window look beyond it.

    Args:
        model: Decoder-only.
        visible: What each new token may attend to, shape [new, past + new].
        copies: How often each token is read.

    Returns:
        Shape [copies, 1, new, past + new].
    """
    config = model.model.config.get_text_config(decoder=True)
    types = getattr(config, "layer_types", None)
    window = getattr(config, "sliding_window", None)
    whole = _added(model, visible, copies)
    if not window or (types is not None and "sliding_attention" not in types):
        return whole
    # A node sees its ancestors alone, so the last ones before it are the nearest by depth.
    behind = visible.flip(1).long().cumsum(1).flip(1)
    near = _added(model, visible & (behind <= window), copies)
    if types is None:
        return near
    return {kind: near if kind == "sliding_attention" else whole for kind in set(types)}


def _added(model: HFModel, visible: Tensor, copies: int) -> Tensor:
    dtype = model.model.dtype
    mask = torch.zeros(visible.shape, dtype=dtype)
    mask.masked_fill_(~visible, torch.finfo(dtype).min)
    return mask.to(model.device).expand(copies, 1, -1, -1)
