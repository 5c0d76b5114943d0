"""Choosing among a host's continuations where it shows no probabilities: text is all it gives."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trimtab.backends.hf import HFModel
from trimtab.backends.pair import Pair
from trimtab.backends.token_tree import ModelCache, TokenTree, run_tree
from trimtab.backends.tree_check import check_tree
from trimtab.errors import InputError, ModelError


@dataclass(frozen=True)
class Judged:
    """What a small model makes of a continuation.

    Attributes:
        nats: Natural-log probability that it gives to all of it.
        size: Its bytes; 0 where it is empty, or nothing can be said of it.
    """

    nats: float
    size: int


def best_of(pair: Pair, prompt: str, texts: Sequence[str], small_ids: Sequence[int] | None) -> int:
    """Choose the continuation that the expert finds likeliest.

    Args:
        pair: The expert is one of it.
        prompt: What the candidates go on from; in a chat the message.
        texts: The candidates. An empty one has no score, and is chosen only among others alike.
        small_ids: In a chat, what the small models read before the answer.

    Returns:
        The place of the chosen one.

    Raises:
        InputError: A candidate is longer than the small models can read.
    """
    with pair.as_expert() as expert:
        return chosen(judged(expert, prompt, texts, small_ids))


def check_room(
    small: HFModel, prompt: str, max_new_tokens: int, small_ids: Sequence[int] | None
) -> None:
    """Refuse candidates that a small model would have no positions for, before they are asked for.

    Args:
        small: Expert or reference.
        prompt: What they go on from.
        max_new_tokens: Of the longest candidate, by the host's tokenizer; by the small model's it
            may have more, which only its text can tell.
        small_ids: In a chat, what the small model reads before the answer.

    Raises:
        InputError: There are too few positions.
    """
    limit = small.max_tokens
    ids = [*small.context_ids(), *small.encode(prompt)] if small_ids is None else small_ids
    if limit is None or len(ids) + max_new_tokens <= limit:
        return
    room = limit - len(ids)
    raise InputError(
        f"the expert is to read a prompt of {len(ids)} tokens and candidates of up to"
        f" {max_new_tokens}, and {small.ref} has positions for {limit}",
        hint=f"use --max-new-tokens {room} or less" if room > 0 else "give a shorter prompt",
    )


def chosen(candidates: Sequence[Judged]) -> int:
    """Place of the best candidate: of those alike the first.

    The measure is log expert / bytes. What the host finds likely it has written more often already.
    The quotient of expert and reference, which leaves only what tuning has changed, gained nothing
    sure where this gained much (docs/log.md, 2026-11-27). The sum over tokens is divided by the
    bytes of the continuation: else short ones would win.
    """
    scores = [one.nats / one.size if one.size else -torch.inf for one in candidates]
    return scores.index(max(scores))


def judged(
    model: HFModel, prompt: str, texts: Sequence[str], small_ids: Sequence[int] | None
) -> list[Judged]:
    """Ask a small model how likely continuations are.

    What they go on from is read once for all of them, as one tree, by models that can.

    Args:
        model: Expert or reference.
        prompt: What they go on from.
        texts: The continuations.
        small_ids: In a chat, what the model reads before the answer.

    Raises:
        InputError: One is longer than the model can read.
    """
    read = [_read(model, prompt, text, small_ids) if text else ([], 0) for text in texts]
    states = _states(model, [ids for ids, _ in read])
    found = []
    for text, (ids, first), of_text in zip(texts, read, states, strict=True):
        if first >= len(ids):
            found.append(Judged(0.0, 0))
            continue
        targets = torch.tensor(ids[first:])
        logprobs = _logprobs(model.unembedding.logits(of_text[first - 1 : -1]), targets)
        found.append(Judged(float(logprobs.sum()), len(text.encode())))
    return found


def _states(model: HFModel, sequences: Sequence[Sequence[int]]) -> list[Tensor]:
    """Final hidden states of each sequence, shape [tokens, hidden]."""
    longest, limit = max(map(len, sequences), default=0), model.max_tokens
    if not longest or (limit is not None and longest > limit) or not _reads_trees(model):
        return [_alone(model, ids) for ids in sequences]
    tree = TokenTree()
    lines = [tree.line(tree.add(ids)) for ids in sequences]
    states = run_tree(model, tree, ModelCache())
    return [states[line] for line in lines]


def _alone(model: HFModel, ids: Sequence[int]) -> Tensor:
    return model.hidden(torch.tensor([list(ids)]))[0] if ids else torch.zeros(0, 1)


def _reads_trees(model: HFModel) -> bool:
    try:
        check_tree(model)
    except ModelError:
        return False
    return True


def _read(
    small: HFModel, prompt: str, text: str, small_ids: Sequence[int] | None
) -> tuple[list[int], int]:
    """What the small models read, and the place of the continuation's first token."""
    if small_ids is not None:
        return [*small_ids, *small.encode_following(text)], len(small_ids)
    whole, before = small.encode(prompt + text), small.encode(prompt)
    shared = 0
    # A token may span the end of the prompt; it then counts as the continuation's.
    while shared < min(len(whole), len(before)) and whole[shared] == before[shared]:
        shared += 1
    context = small.context_ids()
    # Nothing is said of a first token before which there is nothing.
    return [*context, *whole], max(len(context) + shared, 1)


def _logprobs(logits: Tensor, targets: Tensor) -> Tensor:
    """Of one token a row of logits, shape [rows]."""
    targets = targets[:, None].to(logits.device)
    return logits.double().log_softmax(-1).gather(1, targets)[:, 0]
