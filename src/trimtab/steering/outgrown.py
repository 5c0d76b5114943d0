"""Texts that have become longer than the small models can read: their rows end there."""

from dataclasses import dataclass, field
from typing import Any, final

import torch
from transformers import StoppingCriteria

from trimtab.backends.hf import HFModel
from trimtab.errors import ModelError
from trimtab.steering.scores import SteeringProcessor


@final
@dataclass(frozen=True)
class Outgrown:
    """Rows of the last call of a steered `generate` whose text is longer than the models can read.

    Attributes:
        small: The reference that runs beside the host; None where none does.
        rows: Numbers of the rows; also of such as had ended before and are padded.
    """

    small: HFModel | None = None
    rows: set[int] = field(default_factory=set)


@final
class EndsOutgrown(StoppingCriteria):
    """Ends a row where the expert could say nothing about its next token."""

    def __init__(self, processor: SteeringProcessor, outgrown: Outgrown) -> None:
        """Prepare for one call of `generate`.

        Args:
            processor: Steers it.
            outgrown: Gets the rows.
        """
        self._processor = processor
        self._outgrown = outgrown
        outgrown.rows.clear()

    def __call__(self, input_ids: Any, scores: Any, **options: Any) -> Any:
        """Which rows [rows, seq] end, shape [rows]."""
        del scores, options
        found = self._processor.outgrown(input_ids)
        self._outgrown.rows.update(found)
        ends = torch.zeros(len(input_ids), dtype=torch.bool)
        ends[found] = True
        return ends.to(input_ids.device)


def refuse_outgrown(outgrown: Outgrown) -> None:
    """Refuse what the last call wrote if a text was cut short, where nobody would be told.

    Raises:
        ModelError: A text is longer than the small models can read.
    """
    small = outgrown.small
    if small and outgrown.rows:
        raise ModelError(
            f"an answer with its prompt is longer than {small.ref} can read, which reads along and"
            f" has positions for {small.max_tokens} tokens",
            hint="ask for shorter answers, give shorter prompts, or use --carriers head,memory",
        )


def outgrown_note(small: HFModel, number: int, tokens: int) -> str:
    """What is said of a text that ended so.

    Args:
        small: Expert or reference.
        number: Of its prompt, from 1.
        tokens: That were written.
    """
    return (
        f"the continuation of prompt {number} ends after {tokens} tokens: {small.ref}, which reads"
        f" along, has positions for {small.max_tokens} and no more"
    )
