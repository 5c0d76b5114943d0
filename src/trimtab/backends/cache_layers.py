"""What the layers of a key-value cache hold, and several caches read as one."""

from collections.abc import Sequence
from copy import copy
from typing import Any, final

import torch
from torch import Tensor
from transformers import DynamicCache, DynamicLayer

Layer = tuple[Tensor, Tensor] | None
"""Keys and values, shape [rows, heads, tokens, size]; None where a layer uses those of another."""


SPARE_TOKENS = 128
"""Room that is made for more, where what is held has used up what there was."""


@final
class Room:
    """Memory in which a tensor grows along its second last dimension.

    What is there is copied when the memory is used up, and not whenever a token comes.
    """

    def __init__(self, *, overwrites: bool = True) -> None:
        """Nothing is there yet.

        Args:
            overwrites: What stood behind a beginning may be written over, also in tensors that
                were given back before; else the beginning is copied.
        """
        self._whole: Tensor | None = None
        self._overwrites, self._filled = overwrites, 0

    def put(self, held: Tensor, new: Tensor) -> Tensor:
        """Put something behind what is held.

        Args:
            held: What was given back last, or a beginning of it; anything else is copied.
            new: Of the same shape but in the second last dimension.

        Returns:
            Both together.
        """
        past = held.shape[-2] if held.numel() else 0
        end = past + new.shape[-2]
        whole = self._whole
        is_free = self._overwrites or past >= self._filled
        if whole is None or not (is_free and _is_begun(whole, held, new)) or whole.shape[-2] < end:
            # What is made inside inference mode could not be written to outside.
            with torch.inference_mode(False):
                shape = *new.shape[:-2], end + SPARE_TOKENS, new.shape[-1]
                whole = self._whole = new.new_empty(shape)
            if past:
                whole[..., :past, :] = held
        whole[..., past:end, :] = new
        self._filled = end
        return whole[..., :end, :]


def _is_begun(whole: Tensor, held: Tensor, new: Tensor) -> bool:
    """Whether what is held lies in a room already, or is nothing that would not fit."""
    if held.numel():
        return held.data_ptr() == whole.data_ptr()
    return whole.shape[:-2] == new.shape[:-2] and whole.shape[-1] == new.shape[-1]


@final
class GrowingLayer(DynamicLayer):
    """Keys and values of a layer, which are not copied for each token that comes.

    Transformers' own is: of 2,048 tokens that takes longer than reading a small model's weights.
    """

    def __init__(self) -> None:
        """Nothing is held yet."""
        super().__init__()
        self._rooms = Room(), Room()

    def update(
        self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        """Put new tokens behind those that are held; all of them."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        keys, values = self.keys, self.values
        assert keys is not None and values is not None
        self.keys = self._rooms[0].put(keys, key_states)
        self.values = self._rooms[1].put(values, value_states)
        return self.keys, self.values

    @staticmethod
    def of(keys: Tensor, values: Tensor) -> "GrowingLayer":
        """Hold keys and values already, shape [rows, heads, tokens, size]."""
        layer = GrowingLayer()
        layer.lazy_initialization(keys, values)
        layer.keys, layer.values = keys, values
        return layer

    def beside(self) -> "GrowingLayer":
        """Another that goes on from the same tensors: the next token of either copies them."""
        other = copy(self)
        self._rooms, other._rooms = (Room(), Room()), (Room(), Room())
        return other


@final
class GrowingCache(DynamicCache):
    """A cache of layers that are not copied for each token that comes."""

    def __init__(self) -> None:
        """Layers come with their first tokens."""
        super().__init__()
        self.layer_class_to_replicate = GrowingLayer

    def beside(self) -> "GrowingCache":
        """Another that goes on from here by itself."""
        other = copy(self)
        other.layers = [
            layer.beside() if isinstance(layer, GrowingLayer) else copy(layer)
            for layer in self.layers
        ]
        return other


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
                    cache.layers.append(GrowingLayer())
                layer = cache.layers[number]
                assert isinstance(layer, DynamicLayer)
                if not layer.is_initialized:
                    layer.lazy_initialization(keys, values)
                layer.keys, layer.values = keys, values
