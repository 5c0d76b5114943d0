"""Whether a model's answer to a prompt changes with the padding that a batch puts beside it."""

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from trimtab.backends.hf import HFModel, quiet_transformers
from trimtab.errors import ModelError

PROBE_TOKENS = 4
WRITTEN_TOKENS = 3
LEAST_NATS = -12.0
TOLERANCE_NATS = {torch.float32: 1e-3, torch.float64: 1e-3}
HALF_TOLERANCE_NATS = 0.3
"""In half precision a batch of two rounds otherwise than one."""


def check_padding(host: HFModel, prompts: Sequence[Sequence[int]]) -> None:
    """Refuse to run prompts of different lengths as one batch where the model reads the padding.

    Families with recurrent layers or own counts of positions do; nothing in their configuration
    says so. Asked is the model itself: the distribution after a few tokens, alone and padded.

    Args:
        host: The model.
        prompts: Token ids of each prompt, none empty.

    Raises:
        ModelError: The two differ by more than rounding.
    """
    lengths = [len(prompt) for prompt in prompts]
    # An engine of its own is given the tokens of each row, and no padding.
    if len(set(lengths)) == 1 or host.has_own_logits:
        return
    probe = list(prompts[lengths.index(max(lengths))][: 2 * PROBE_TOKENS])
    few = probe[: len(probe) // 2]
    # Of what no model expects, such as text after its end, half precision rounds much more.
    rest = probe[len(few) :]
    with quiet_transformers():
        alone, beside = (_written(host, rows, rest) for rows in ([few], [few, probe]))
    pairs = [(one[0], other[0]) for one, other in zip(alone, beside, strict=True)]
    worst_nats = max(float(_apart_nats(*pair)) for pair in pairs)
    if worst_nats > max(_tolerance_nats(one, host.unembedding.weight.dtype) for one, _ in pairs):
        raise ModelError(
            f"{host.ref} answers a prompt otherwise when it shares a batch with a longer one (by"
            f" {worst_nats:.2g} nats): its layers read the padding",
            hint="give it one prompt at a time, or prompts of equal length",
        )


def _tolerance_nats(logits: Tensor, dtype: torch.dtype) -> float:
    """What rounding may do: a logit of 40 has steps of a quarter in bfloat16."""
    if dtype in TOLERANCE_NATS:
        return TOLERANCE_NATS[dtype]
    finite = logits[logits.isfinite()].abs().max()
    return max(HALF_TOLERANCE_NATS, 4 * torch.finfo(dtype).eps * float(finite))


def _written(
    host: HFModel, prompts: Sequence[Sequence[int]], following: Sequence[int]
) -> tuple[Tensor, ...]:
    """Logits, shape [prompts, vocab], at each of a few places, all rows going on alike."""
    model, given = cast(Any, host.model), host.padded(prompts)
    # A target begins with one token, however long its source is.
    begin = 1 if host.is_encoder_decoder else given["input_ids"].shape[1]
    found = model.generate(
        **given,
        max_new_tokens=WRITTEN_TOKENS,
        do_sample=False,
        num_beams=1,
        eos_token_id=None,
        pad_token_id=host.pad_id,
        prefix_allowed_tokens_fn=lambda _, ids: [following[(len(ids) - begin) % len(following)]],
        return_dict_in_generate=True,
        output_logits=True,
    )
    return found.logits


def _apart_nats(one: Tensor, other: Tensor) -> Tensor:
    """Largest difference of log-probabilities among tokens that are not hopeless."""
    one, other = one.float().log_softmax(-1), other.float().log_softmax(-1)
    likely = torch.maximum(one, other) > LEAST_NATS
    return (one - other)[likely].abs().max()
