"""What an expert would answer, shown to a host that gives nothing but text."""

from collections.abc import Sequence

import torch
from transformers import GenerationConfig

from trimtab.backends.hf import quiet_transformers
from trimtab.backends.pair import Pair

_WITH_DRAFT = """{message}

A specialist's draft of the answer follows. It may be wrong or break off: keep what is right in it,
and give your own complete answer.

{draft}"""


def expert_draft(pair: Pair, small_ids: Sequence[int], max_tokens: int) -> str:
    """The expert's greedy answer.

    Args:
        pair: The expert is one of it.
        small_ids: What it reads before the answer.
        max_tokens: Longest answer; less where the expert cannot read so many.

    Returns:
        Whole characters; nothing where the expert ends at once or has no room.
    """
    longest = pair.reference.max_tokens
    room = max_tokens if longest is None else min(max_tokens, longest - len(small_ids))
    if room < 1 or not small_ids:
        return ""
    with pair.as_expert() as expert, torch.no_grad(), quiet_transformers():
        ids = torch.tensor([list(small_ids)], device=expert.device)
        written = expert.model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            # The model's own settings may sample or penalise.
            generation_config=GenerationConfig(
                max_new_tokens=room,
                do_sample=False,
                num_beams=1,
                num_return_sequences=1,
                repetition_penalty=1.0,
                eos_token_id=sorted(expert.end_ids) or None,
                pad_token_id=expert.pad_id,
            ),
        )  # pyright: ignore[reportCallIssue]
    texts = pair.vocabulary.token_bytes
    answer = b"".join(texts[token_id] or b"" for token_id in written[0, len(small_ids) :].tolist())
    return answer.decode("utf-8", "ignore").strip()


def with_draft(message: str, draft: str) -> str:
    """A message and a draft of its answer, as one message; without a draft as it is."""
    return _WITH_DRAFT.format(message=message, draft=draft) if draft else message
