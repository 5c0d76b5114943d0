"""Proxy tuning as published: host, expert and anti-expert in lock-step, over the full vocabulary.

DExperts (Liu et al. 2021, arXiv 2105.03023) and proxy tuning (Liu et al. 2024, arXiv 2401.08565):
at every token each of the three models reads the last token, each with its own key-value cache, and

    logits = logits_host + alpha (logits_expert - logits_antiexpert)

over all tokens. The expert is a model of its own, whose weights hold what tuning has changed.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from bench.speed.timing import Clock


@dataclass(frozen=True)
class ProxyModels:
    """The three models.

    Attributes:
        host: The large model.
        expert: The tuned small model.
        antiexpert: The small model before tuning.
    """

    host: PreTrainedModel
    expert: PreTrainedModel
    antiexpert: PreTrainedModel

    @property
    def all(self) -> tuple[PreTrainedModel, ...]:
        """In the order of the formula."""
        return (self.host, self.expert, self.antiexpert)


@torch.inference_mode()
def proxy_tuned(
    models: ProxyModels,
    prompt: Tensor,
    new_tokens: int,
    clock: Clock,
    *,
    alpha: float = 1.0,
    banned: Sequence[int] = (),
) -> Tensor:
    """Decode greedily.

    Args:
        models: Of one vocabulary; the rows that fill it up may differ in number.
        prompt: Shape [1, tokens].
        new_tokens: How many to write.
        clock: Is told each token, the prompt first.
        alpha: Strength of the shift; published figures are at 1.
        banned: Tokens that are never written, so that a text does not end early.

    Returns:
        Prompt and text, shape [1, tokens].
    """
    caches = [DynamicCache(config=model.config) for model in models.all]
    clock.put(prompt)
    ids = unread = prompt
    for _ in range(new_tokens):
        host, expert, antiexpert = (
            model(input_ids=unread, past_key_values=cache, use_cache=True, logits_to_keep=1)
            .logits[:, -1]
            .float()
            for model, cache in zip(models.all, caches, strict=True)
        )
        shared = min(host.shape[-1], expert.shape[-1])
        logits = host[:, :shared] + alpha * (expert[:, :shared] - antiexpert[:, :shared])
        logits[:, list(banned)] = -torch.inf
        unread = logits.argmax(-1, keepdim=True)
        ids = torch.cat([ids, unread], 1)
        clock.put(unread)
    return ids
