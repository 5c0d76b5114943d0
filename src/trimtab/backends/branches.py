"""A host's states of texts that begin alike, whose beginning is read once."""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import DynamicCache

from trimtab.backends.hf import HFModel
from trimtab.backends.positions import keeps_single_tokens, positions_follow_length


def branch_states(
    model: HFModel, token_ids: Sequence[int], branches: Sequence[Sequence[int]]
) -> list[Tensor]:
    """Compute the inputs of the head for one beginning with each of several ways to go on.

    Alternatives are short and what they answer is long. A model that keeps more than keys and
    values of single tokens, or whose positions depend on a pass's length, reads it with each.

    Args:
        model: A decoder-only model.
        token_ids: What all begin with; at least one token.
        branches: Tokens that follow it; there may be none.

    Returns:
        Final hidden states of beginning and branch, each of shape [seq, hidden].

    Raises:
        InputError: More tokens than the model has positions.
    """
    # Alternatives of one token each are asked after the same text.
    distinct = list(dict.fromkeys(map(tuple, branches)))
    if len(distinct) > 1 and _can_branch(model):
        found = _branched(model, token_ids, distinct)
    else:
        found = _whole(model, [[*token_ids, *branch] for branch in distinct])
    by_branch = dict(zip(distinct, found, strict=True))
    return [by_branch[tuple(branch)] for branch in branches]


def _can_branch(model: HFModel) -> bool:
    by_token = not model.has_own_logits and keeps_single_tokens(model)
    return by_token and not positions_follow_length(model)


def _branched(
    model: HFModel, token_ids: Sequence[int], branches: Sequence[Sequence[int]]
) -> list[Tensor]:
    rows = _padded(branches, token_ids[-1]).to(model.device)
    model.check_length(len(token_ids) + rows.shape[1])
    cache = DynamicCache(config=model.model.config.get_text_config(decoder=True))
    with torch.inference_mode():
        begun = _run(model, torch.tensor([list(token_ids)], device=model.device), cache)[0]
        cache.batch_repeat_interleave(len(rows))
        ends = _run(model, rows, cache)
    return [torch.cat([begun, end[: len(b)]]) for end, b in zip(ends, branches, strict=True)]


def _run(model: HFModel, rows: Tensor, cache: DynamicCache) -> Tensor:
    run = model.model.base_model
    return run(input_ids=rows, past_key_values=cache, use_cache=True).last_hidden_state


def _whole(model: HFModel, rows: Sequence[Sequence[int]]) -> list[Tensor]:
    with torch.inference_mode():
        states = model.hidden(_padded(rows, 0).to(model.device))
    return [found[: len(row)] for found, row in zip(states, rows, strict=True)]


def _padded(rows: Sequence[Sequence[int]], filler: int) -> Tensor:
    """Rows as one batch: what stands on the right of a token changes nothing for a decoder."""
    longest = max(map(len, rows))
    return torch.tensor([[*row, *[filler] * (longest - len(row))] for row in rows])
