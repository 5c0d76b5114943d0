"""A host and small models with the same tokens: their distributions are compared token by token."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from trimtab.backends.reading import Part
from trimtab.vocab import Vocabulary

LogitsAfter = Callable[[Sequence[int]], Tensor]
"""A model's logits after some nodes of a reading, in float32 on the CPU, shape [nodes, vocab]."""


def is_one_vocabulary(small: Vocabulary, host: Vocabulary) -> bool:
    """Whether both have the same tokens, but for rows that only fill them up.

    The number of such rows differs within one family.
    """
    return _unpadded(small) == _unpadded(host)


def reads_host_tokens(part: Part) -> bool:
    """Whether each context that is asked about was read in one way, which ends where it ends."""
    covers = [part.reading.covers[question] for question in part.questions]
    return all(len(ways) < 2 and not any(cover.rest for cover in ways) for ways in covers)


def score_same(part: Part, logits_after: LogitsAfter, token_ids: Tensor, is_text: Tensor) -> Tensor:
    """What `Alignment.to_host` comes to between equal tokens, without looking for their strings.

    Each text keeps the small model's probability, given that text goes on. What stands for no
    text, and may mean something else in both models, keeps the host's.

    Args:
        part: What is asked; its contexts are read as the host's tokens (`reads_host_tokens`).
        logits_after: Of the small model.
        token_ids: The candidates, shape [candidates].
        is_text: Which of the small model's tokens stand for text, shape [vocab of small].

    Returns:
        Shape [questions, candidates]; the host's own where nothing was read.
    """
    ends = [part.reading.ends[question] for question in part.questions]
    asked = [number for number, nodes in enumerate(ends) if nodes]
    carried = part.host_probs.clone()
    if not asked:
        return carried
    logits = logits_after([ends[number][0] for number in asked])
    logits = logits.masked_fill(~is_text, -torch.inf)
    # Rows that only the host has stand for no text.
    known = token_ids.clamp_max(len(is_text) - 1)
    is_foreign = (known < token_ids) | ~is_text[known]
    own = (logits[:, known] - logits.logsumexp(-1, keepdim=True)).exp()
    left = 1.0 - (carried[asked] * is_foreign).sum(-1, keepdim=True)
    carried[asked] = torch.where(is_foreign, carried[asked], own * left)
    return carried


def _unpadded(vocabulary: Vocabulary) -> tuple[bytes | None, ...]:
    end = len(vocabulary)
    while end and vocabulary.token_bytes[end - 1] is None:
        end -= 1
    return vocabulary.token_bytes[:end]
