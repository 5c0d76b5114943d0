"""What the layers of a key-value cache hold."""

from torch import Tensor
from transformers import DynamicCache

Layer = tuple[Tensor, Tensor] | None
"""Keys and values, shape [rows, heads, tokens, size]; None where a layer uses those of another."""


def layers_of(cache: DynamicCache) -> list[Layer]:
    """Keys and values of each layer."""
    found: list[Layer] = []
    for layer in cache.layers:
        keys, values = getattr(layer, "keys", None), getattr(layer, "values", None)
        found.append(None if keys is None or values is None else (keys, values))
    return found
