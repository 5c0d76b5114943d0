"""Choosing among a host's continuations where it shows no probabilities: text is all it gives."""

from collections.abc import Sequence

import torch
from torch import Tensor

from trimtab.backends.hf import HFModel
from trimtab.backends.pair import Pair


def best_of(pair: Pair, prompt: str, texts: Sequence[str], small_ids: Sequence[int] | None) -> int:
    """Choose the continuation that the expert finds likelier than its reference by most.

    The measure is (log expert - log reference) / bytes, in nats. The reference takes out what any
    model finds likely, so that neither common words nor a candidate's ease count, only what tuning
    has changed. The sum over tokens is divided by the bytes of the continuation: else longer
    candidates would have larger scores of either sign.

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
    scores = [_score(pair, prompt, text, small_ids) for text in texts]
    return scores.index(max(scores))


def _score(pair: Pair, prompt: str, text: str, small_ids: Sequence[int] | None) -> float:
    size = len(text.encode())
    if not size:
        return -torch.inf
    ids, first = _read(pair.reference, prompt, text, small_ids)
    if first >= len(ids):
        return -torch.inf
    token_ids = torch.tensor([ids])
    states = pair.hidden(token_ids)
    expert = _logprobs(pair.expert_unembedding.logits(states.expert[0, first - 1 : -1]), token_ids)
    reference = _logprobs(
        pair.reference_unembedding.logits(states.reference[0, first - 1 : -1]), token_ids
    )
    return float((expert - reference).sum()) / size


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


def _logprobs(logits: Tensor, token_ids: Tensor) -> Tensor:
    """Of the last tokens, one a row of logits."""
    targets = token_ids[0, -len(logits) :, None].to(logits.device)
    return logits.double().log_softmax(-1).gather(1, targets)[:, 0]
