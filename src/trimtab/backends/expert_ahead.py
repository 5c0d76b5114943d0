"""What the expert expects of tokens to come, for drafts, which are verified whatever it says."""

from collections.abc import Sequence
from functools import cached_property
from typing import final

import torch
from torch import Tensor

from trimtab.backends.cache_layers import layers_of
from trimtab.backends.hf import HFModel
from trimtab.backends.pair import Pair
from trimtab.backends.pair_passes import run_expert_line, serves_both
from trimtab.backends.reading import PairCaches
from trimtab.backends.token_tree import ModelCache, run_line
from trimtab.machine import free_memory_bytes

FEW_UNREAD = 8
"""Tokens that a copy in bfloat16 reads at most: a processor multiplies many states in it far more
slowly than in float32, unless it has instructions for that."""

_LEAST_FREE = 4
"""Times the copy's size that must be free."""


@final
class ExpertAhead:
    """The expert one token after another, on a processor from a copy in bfloat16.

    A token takes as long as reading the weights, and a draft decides nothing but the speed. What
    came before a draft the copy takes from what expert and reference have read as they are.
    """

    def __init__(self, pair: Pair) -> None:
        """Nothing is copied before the first draft."""
        self._pair = pair
        self._cached = ModelCache()
        self._exact_tokens = 0

    def logits_after(self, tokens: Sequence[int], caches: PairCaches) -> Tensor:
        """About the expert's logits after some tokens, float32 on the CPU, shape [vocab].

        Args:
            tokens: At least one token.
            caches: What expert and reference keep of the text that the tokens go on from.
        """
        with torch.no_grad():
            light = self.light
            if light is not None:
                self._take(tokens, caches.both)
                if len(tokens) - len(self._cached.tokens) <= FEW_UNREAD:
                    return light.unembedding.logits(run_line(light, tokens, self._cached)).float()
            state = run_expert_line(self._pair, tokens, caches)
            return self._pair.expert_unembedding.logits(state).float().cpu()

    @cached_property
    def light(self) -> HFModel | None:
        """The copy, where one pays: of a LoRA in float32, on a processor, with room for it."""
        model = self._pair.reference
        if model.device.type != "cpu" or model.model.dtype is not torch.float32:
            return None
        copy_bytes = sum(2 * weight.numel() for weight in model.model.parameters())
        if not serves_both(self._pair) or _LEAST_FREE * copy_bytes > free_memory_bytes():
            return None
        return self._pair.expert_copy(torch.bfloat16)

    def _take(self, tokens: Sequence[int], exact: ModelCache) -> None:
        """Keep what the copy has read of these tokens, and have what is exact in its place."""
        read = _alike(tokens[:-1], exact.tokens)
        kept = _alike(tokens[:-1], self._cached.tokens)
        self._exact_tokens = min(self._exact_tokens, kept)
        if read > self._exact_tokens:
            kept = self._exact_tokens
        self._cached.tokens, self._cached.states = list(tokens[: max(kept, read)]), []
        self._cached.cut(kept)
        if read <= kept:
            return
        for number, layer in enumerate(layers_of(exact.cache)):
            if layer is not None:
                # The second row is the expert's.
                keys, values = (side[1:, :, kept:read].bfloat16() for side in layer)
                self._cached.cache.update(keys, values, number)
        self._exact_tokens = read


def _alike(ours: Sequence[int], theirs: Sequence[int]) -> int:
    """How many tokens two sequences begin with alike."""
    for place, (one, other) in enumerate(zip(ours, theirs, strict=False)):
        if one != other:
            return place
    return min(len(ours), len(theirs))
