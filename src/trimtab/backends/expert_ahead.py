"""What the expert expects of tokens to come, for drafts, which are verified whatever it says."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, final

import torch
from torch import Tensor, nn

from trimtab.backends.cache_layers import layers_of
from trimtab.backends.hf import HFModel
from trimtab.backends.int8 import Int8Linear, is_possible, is_rounded, quantise
from trimtab.backends.lean import make_lean
from trimtab.backends.pair import Pair
from trimtab.backends.pair_passes import run_expert_line, serves_both
from trimtab.backends.prefix import common_length
from trimtab.backends.reading import PairCaches
from trimtab.backends.token_tree import ModelCache, emptied_if_broken_off, run_line
from trimtab.backends.tree_check import PROBE, is_about
from trimtab.light_peft import LoraModel

FEW_UNREAD = 8
"""Tokens that a copy reads at most: a processor multiplies many states with its small numbers more
slowly than in float32, unless it has instructions for that."""

MOST_COPIED_BYTES = 2**30
"""Largest copy that is kept; while it is made it takes up to twice as much. No question of what
memory is free: drafts decide which random numbers are drawn, and a seed's text must not depend on
what else runs."""


@final
@dataclass(frozen=True)
class Light:
    """A copy of the expert in small numbers.

    Attributes:
        model: With layers of one byte a weight.
        head: What its final states are multiplied by, likewise, and the model then has no rows of
            its own for it; None where the model's own head is used.
    """

    model: HFModel
    head: Int8Linear | None

    def logits(self, state: Tensor) -> Tensor:
        """About the expert's logits, shape [vocab], of a final state, shape [hidden]."""
        whole = self.model.unembedding
        if self.head is None:
            return whole.logits(state)
        return whole.of_linear(self.head(state.to(whole.weight.dtype)))


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
                    state = run_line(light.model, tokens, self._cached)
                    return light.logits(state).float()
            state = run_expert_line(self._pair, tokens, caches)
            return self._pair.expert_unembedding.logits(state).float().cpu()

    @cached_property
    def light(self) -> "Light | None":
        """The copy, where one pays and is right: of a small LoRA on a processor."""
        model = self._pair.reference
        if model.device.type != "cpu":
            return None
        if not serves_both(self._pair) or copied_bytes(model) > MOST_COPIED_BYTES:
            return None
        copied = self._pair.expert_copy(torch.bfloat16)
        quantise(copied.model.base_model)
        make_lean(copied.model)
        light = _with_small_head(copied)
        return light if _follows(light, self._pair) else None

    def _take(self, tokens: Sequence[int], exact: ModelCache) -> None:
        """Keep what the copy has read of these tokens, and have what is exact in its place."""
        read = common_length(tokens[:-1], exact.tokens)
        kept = min(
            common_length(tokens[:-1], self._cached.tokens), self._cached.cache.get_seq_length()
        )
        self._exact_tokens = min(self._exact_tokens, kept)
        if read > self._exact_tokens:
            kept = self._exact_tokens
        self._cached.tokens = list(tokens[: max(kept, read)])
        self._cached.states = self._cached.states[:0]
        self._cached.cut(kept)
        if read <= kept:
            return
        with emptied_if_broken_off(self._cached.cache):
            for number, layer in enumerate(layers_of(exact.cache)):
                if layer is not None:
                    # The second row is the expert's.
                    keys, values = (side[1:, :, kept:read].bfloat16() for side in layer)
                    self._cached.cache.update(keys, values, number)
        self._exact_tokens = read


def copied_bytes(model: HFModel) -> int:
    """Bytes of a copy's weights once it is made, its head's included."""
    trunk, head = model.model.base_model, model.unembedding.weight
    own = [weight for name, weight in trunk.named_parameters() if LoraModel.prefix not in name]
    sizes = {id(weight): 2 * weight.numel() for weight in own}
    for module in trunk.modules():
        weight: Any = getattr(module, "weight", None)
        if id(weight) in sizes and is_rounded(module):
            sizes[id(weight)] = weight.numel()
    return sum(sizes.values()) + head.numel() * (1 if is_possible(head) else 2)


def _with_small_head(copied: HFModel) -> Light:
    """Give a copy a head of small numbers, in the place of one of its own."""
    head: Any = copied.model.get_output_embeddings()
    whole = copied.unembedding
    if not is_possible(whole.weight):
        return Light(copied, None)
    small = Int8Linear.of(whole.weight)
    if head is not None and head.weight is not copied.model.get_input_embeddings().weight:
        copied.model.set_output_embeddings(nn.Identity())
    no_rows = whole.weight.new_empty(0, whole.weight.shape[1])
    return Light(replace(copied, unembedding=replace(whole, weight=no_rows)), small)


def _follows(light: Light, pair: Pair) -> bool:
    """Whether a copy computes at all, and about what the expert does, which is tried once."""
    try:
        ours = run_line(light.model, PROBE, ModelCache())
        light.logits(ours)
    except (RuntimeError, ValueError, TypeError):
        # Families that mix their weights with numbers of another size.
        return False
    exact = run_expert_line(pair, PROBE, PairCaches())
    return is_about(ours, exact)
