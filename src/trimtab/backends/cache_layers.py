"""What the layers of a key-value cache hold, and several caches read as one."""

from collections.abc import Sequence
from typing import Any, final

import torch
from torch import Tensor
from transformers import DynamicCache, DynamicLayer

Layer = tuple[Tensor, Tensor] | None
"""Keys and values, shape [rows, heads, tokens, size]; None where a layer uses those of another."""


def layers_of(cache: DynamicCache) -> list[Layer]:
    """Keys and values of each layer."""
    found: list[Layer] = []
    for layer in cache.layers:
        keys, values = getattr(layer, "keys", None), getattr(layer, "values", None)
        found.append(None if keys is None or values is None else (keys, values))
    return found


@final
class JointCache(DynamicCache):
    """A cache for one pass over the next tokens of several caches, each after what its own holds.

    Columns are those of the first cache and its new tokens, then of the second, and so on. Keys and
    values are copied once, when the new ones come; `deal_out` gives the caches views of that copy.
    """

    def __init__(self, caches: Sequence[DynamicCache], sizes: Sequence[int]) -> None:
        """Begin a pass.

        Args:
            caches: Some may be empty.
            sizes: New tokens of each.
        """
        super().__init__()
        self._caches, self._sizes = caches, sizes
        self._held = [layers_of(cache) for cache in caches]
        self._past = [cache.get_seq_length() for cache in caches]
        self._joined: dict[int, tuple[Tensor, Tensor]] = {}

    def get_seq_length(self, layer_idx: int = 0) -> int:  # noqa: ARG002 - transformers asks by layer
        """Tokens in all caches, before the new ones."""
        return sum(self._past)

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        """Put the new tokens of each behind what it holds, in one layer."""
        pieces: tuple[list[Tensor], list[Tensor]] = ([], [])
        for side, new_states in enumerate((key_states, value_states)):
            for layers, new in zip(self._held, new_states.split(self._sizes, -2), strict=True):
                layer = layers[layer_idx] if layers else None
                pieces[side].extend((new,) if layer is None else (layer[side], new))
        self._joined[layer_idx] = torch.cat(pieces[0], -2), torch.cat(pieces[1], -2)
        return self._joined[layer_idx]

    def deal_out(self) -> None:
        """Give each cache its part after the pass; layers without keys of their own stay so."""
        widths = [past + new for past, new in zip(self._past, self._sizes, strict=True)]
        for number, sides in self._joined.items():
            parts = zip(*(side.split(widths, -2) for side in sides), strict=True)
            for cache, (keys, values) in zip(self._caches, parts, strict=True):
                while len(cache.layers) <= number:
                    cache.layers.append(DynamicLayer())
                layer = cache.layers[number]
                assert isinstance(layer, DynamicLayer)
                if not layer.is_initialized:
                    layer.lazy_initialization(keys, values)
                layer.keys, layer.values = keys, values
