"""What the expert expects of tokens to come, for drafts, which are verified whatever it says."""

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import final

import torch
from torch import Tensor

from trimtab.backends.cache_layers import layers_of
from trimtab.backends.hf import HFModel
from trimtab.backends.int8 import Int8Linear, is_possible, quantise
from trimtab.backends.lean import make_lean
from trimtab.backends.pair import Pair
from trimtab.backends.pair_passes import run_expert_line, serves_both
from trimtab.backends.prefix import common_length
from trimtab.backends.reading import PairCaches
from trimtab.backends.token_tree import ModelCache, run_line
from trimtab.backends.tree_check import PROBE, is_about

FEW_UNREAD = 8
"""Tokens that a copy reads at most: a processor multiplies many states with its small numbers more
slowly than in float32, unless it has instructions for that."""

MOST_COPIED_BYTES = 2**30
"""Largest copy. No question of what memory is free: drafts decide which random numbers are drawn,
and a seed's text must not depend on what else runs."""


@final
class ExpertAhead:
    """The expert one token after another, on a processor from a copy with weights of one byte.

    A token takes as long as reading the weights, and a draft decides nothing but the speed. What
    came before a draft the copy takes from what expert and reference have read as they are. The
    copy's states and embeddings are bfloat16.
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
                    return self._light_logits(run_line(light, tokens, self._cached)).float()
            state = run_expert_line(self._pair, tokens, caches)
            return self._pair.expert_unembedding.logits(state).float().cpu()

    @cached_property
    def light(self) -> HFModel | None:
        """The copy, where one pays and is right: of a small LoRA on a processor."""
        model = self._pair.reference
        if model.device.type != "cpu":
            return None
        copy_bytes = sum(2 * weight.numel() for weight in model.model.parameters())
        if not serves_both(self._pair) or copy_bytes > MOST_COPIED_BYTES:
            return None
        light = self._pair.expert_copy(torch.bfloat16)
        quantise(light.model.base_model)
        make_lean(light.model)
        return light if _follows(light, self._pair) else None

    @cached_property
    def _light_logits(self) -> Callable[[Tensor], Tensor]:
        """From a state of the copy to its logits, by a head of one byte a weight where it can."""
        assert self.light is not None
        whole = self.light.unembedding
        if not is_possible(whole.weight):
            return whole.logits
        head = Int8Linear.of(whole.weight)
        return lambda state: whole.of_linear(head(state))

    def _take(self, tokens: Sequence[int], exact: ModelCache) -> None:
        """Keep what the copy has read of these tokens, and have what is exact in its place."""
        read = common_length(tokens[:-1], exact.tokens)
        kept = min(
            common_length(tokens[:-1], self._cached.tokens), self._cached.cache.get_seq_length()
        )
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


def _follows(light: HFModel, pair: Pair) -> bool:
    """Whether a copy computes at all, and about what the expert does, which is tried once."""
    try:
        ours = run_line(light, PROBE, ModelCache())
    except (RuntimeError, ValueError, TypeError):
        # Families that mix their weights with numbers of another size.
        return False
    exact = run_expert_line(pair, PROBE, PairCaches())
    return is_about(ours, exact)
