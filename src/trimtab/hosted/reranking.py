"""Choosing among a host's continuations where it shows no probabilities: text is all it gives."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trimtab.backends.hf import HFModel
from trimtab.backends.pair import Pair, PairStates
from trimtab.backends.token_tree import ModelCache, TokenTree, run_tree
from trimtab.backends.tree_check import check_tree
from trimtab.errors import ModelError


@dataclass(frozen=True)
class Judged:
    """What the small models make of a continuation.

    Attributes:
        expert_nats: Natural-log probability that the expert gives to all of it.
        reference_nats: That the reference gives.
        size: Its bytes; 0 where it is empty, or nothing can be said of it.
    """

    expert_nats: float
    reference_nats: float
    size: int


def best_of(pair: Pair, prompt: str, texts: Sequence[str], small_ids: Sequence[int] | None) -> int:
    """Choose the continuation that the expert finds likelier than its reference by most.

    Args:
        pair: Expert and reference.
        prompt: What the candidates go on from; in a chat the message.
        texts: The candidates. An empty one has no score, and is chosen only among others alike.
        small_ids: In a chat, what the small models read before the answer.

    Returns:
        The place of the chosen one.

    Raises:
        InputError: A candidate is longer than the small models can read.
    """
    return chosen(judged(pair, prompt, texts, small_ids))


def chosen(candidates: Sequence[Judged]) -> int:
    """Place of the best candidate: of those alike the first.

    The measure is (log expert - log reference) / bytes, in nats. The reference takes out what any
    model finds likely, so that neither common words nor a candidate's ease count, only what tuning
    has changed. The sum over tokens is divided by the bytes of the continuation: else longer
    candidates would have larger scores of either sign.
    """
    scores = [
        (one.expert_nats - one.reference_nats) / one.size if one.size else -torch.inf
        for one in candidates
    ]
    return scores.index(max(scores))


def judged(
    pair: Pair, prompt: str, texts: Sequence[str], small_ids: Sequence[int] | None
) -> list[Judged]:
    """Ask expert and reference how likely continuations are.

    What they go on from is read once for all of them, as one tree, by models that can.

    Args:
        pair: Expert and reference.
        prompt: What they go on from.
        texts: The continuations.
        small_ids: In a chat, what the small models read before the answer.

    Raises:
        InputError: One is longer than the small models can read.
    """
    read = [_read(pair.reference, prompt, text, small_ids) if text else ([], 0) for text in texts]
    states = _states(pair, [ids for ids, _ in read])
    found = []
    for text, (ids, first), of_text in zip(texts, read, states, strict=True):
        if first >= len(ids):
            found.append(Judged(0.0, 0.0, 0))
            continue
        targets = torch.tensor(ids[first:])
        expert = _logprobs(pair.expert_unembedding.logits(of_text.expert[first - 1 : -1]), targets)
        reference = _logprobs(
            pair.reference_unembedding.logits(of_text.reference[first - 1 : -1]), targets
        )
        found.append(Judged(float(expert.sum()), float(reference.sum()), len(text.encode())))
    return found


def _states(pair: Pair, sequences: Sequence[Sequence[int]]) -> list[PairStates]:
    """Final hidden states of each sequence, two tensors of shape [tokens, hidden]."""
    longest, limit = max(map(len, sequences), default=0), pair.reference.max_tokens
    if not longest or (limit is not None and longest > limit) or not _reads_trees(pair):
        return [_alone(pair, ids) for ids in sequences]
    tree = TokenTree()
    lines = [tree.line(tree.add(ids)) for ids in sequences]
    reference = run_tree(pair.reference, tree, ModelCache())
    with pair.as_expert() as model:
        expert = run_tree(model, tree, ModelCache())
    return [PairStates(reference[line], expert[line]) for line in lines]


def _alone(pair: Pair, ids: Sequence[int]) -> PairStates:
    if not ids:
        return PairStates(torch.zeros(0, 1), torch.zeros(0, 1))
    return PairStates(*(side[0] for side in pair.hidden(torch.tensor([list(ids)]))))


def _reads_trees(pair: Pair) -> bool:
    try:
        check_tree(pair.reference)
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
