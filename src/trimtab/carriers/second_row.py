"""A LoRA beside linear layers for the second of two rows: one pass serves base and expert."""

from collections.abc import Sequence
from typing import final

import torch
from torch import Tensor, nn


@final
class SecondRow:
    """A linear layer with a LoRA's path added to the second row of what it is given."""

    def __init__(self, base: nn.Module, down: Tensor, up: Tensor) -> None:
        """Take the layer and its path.

        Args:
            base: The linear layer.
            down: To the rank, shape [features, rank].
            up: From the rank, the LoRA's scale included, shape [rank, outputs].
        """
        self._base = base
        self.down = down
        self.up = up

    def __call__(self, states: Tensor) -> Tensor:
        """Apply it, shape [2, tokens, features] to [2, tokens, outputs].

        Raises:
            ValueError: The states have another shape.
        """
        out = self.plain(states)
        added = states[1].to(self.down.dtype) @ self.down
        if out.dtype is self.up.dtype:
            out[1].addmm_(added, self.up)
        else:
            out[1].add_(added @ self.up)
        return out

    def plain(self, states: Tensor) -> Tensor:
        """The layer alone; errors as of a call."""
        if states.dim() != 3 or len(states) != 2:
            raise ValueError(f"a layer was given states of shape {tuple(states.shape)}")
        return self._base(states)


@final
class SecondRows:
    """Several such layers that read the same states, with one path beside all of them."""

    def __init__(self, layers: Sequence[SecondRow]) -> None:
        """Join the layers' paths; their own weights stay where they are."""
        self._layers = layers
        self._down = torch.cat([layer.down for layer in layers], 1)
        self._up = torch.block_diag(*(layer.up for layer in layers))
        self._sizes = [layer.up.shape[1] for layer in layers]

    def __call__(self, states: Tensor) -> list[Tensor]:
        """Apply them, shape [2, tokens, features]; errors as of one of them."""
        found = [layer.plain(states) for layer in self._layers]
        added = states[1].to(self._down.dtype) @ self._down @ self._up
        for out, part in zip(found, added.split(self._sizes, -1), strict=True):
            out[1].add_(part)
        return found
