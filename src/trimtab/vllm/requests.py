"""A steered request in vLLM: what its prompt says of its adapters, and the text before a token."""

from collections.abc import Sequence
from typing import final

import torch
from torch import Tensor

from trimtab.carriers.memory import CONTEXT_BYTES
from trimtab.steering.evidence import ReadPrompt, evidence_positions
from trimtab.steering.several import Several
from trimtab.unembedding import Unembeds
from trimtab.vocab import Vocabulary


@final
class SteeredRequest:
    """A request that adapters steer, from the reading of its prompt on.

    A prompt may be read in parts, and again from its beginning where vLLM has dropped what it
    knew of the request (preemption).
    """

    def __init__(self, several: Several, prompt: Sequence[int], vocabulary: Vocabulary) -> None:
        """Begin with nothing read.

        Args:
            several: What steers.
            prompt: Token ids.
            vocabulary: The host's.
        """
        self.several = several
        self.weights: Tensor | None = None
        ids, pieces = torch.tensor(list(prompt)), tuple(vocabulary.token_bytes[i] for i in prompt)
        asked = evidence_positions(ReadPrompt(ids, pieces, torch.empty(len(ids), 0)))
        self._prompt = ids, pieces
        self._first = asked[0] if asked else len(ids)
        self.next = 0
        self._states: list[Tensor] = []

    def hear(self, start: int, hidden: Tensor, head: Unembeds) -> None:
        """Hear that the host has read more tokens, and weigh the adapters once it is the prompt.

        Args:
            start: Position of the first of them in the request.
            hidden: Their states, shape [tokens, hidden]; what is needed of them is copied.
            head: The host's.
        """
        length = len(self._prompt[0])
        if start != self.next:
            self._states = []
        self.next = end = start + len(hidden)
        kept = slice(max(self._first - start, 0), max(length - start, 0))
        self._states.append(hidden[kept].clone())
        if end < length:
            return
        read = ReadPrompt(*self._prompt, torch.cat(self._states))
        self.weights = self.several.weigh(head, read, [None] * len(self.several.mixtures))
        self._states = []


def bytes_before(token_ids: Sequence[int], vocabulary: Vocabulary) -> bytes:
    """The last bytes of a text, at least as many as a memory compares.

    Args:
        token_ids: The text's tokens, of which special ones stand for nothing.
        vocabulary: The host's.
    """
    found = b""
    for token_id in reversed(token_ids):
        found = (vocabulary.token_bytes[token_id] or b"") + found
        if len(found) >= CONTEXT_BYTES:
            break
    return found
