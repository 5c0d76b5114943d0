"""Explanations of an answer's tokens, where a request asks for them."""

import codecs
from collections.abc import Sequence
from typing import final

from torch import Tensor

from trimtab.backends.hf import HFModel
from trimtab.steering.explain import Explanation, Voice, explain


@final
class Speller:
    """Spells single tokens: their text, or their name where they stand for none."""

    def __init__(self, host: HFModel) -> None:
        """Ask the tokenizer once, before other threads use it."""
        self._token_bytes = host.vocabulary.token_bytes
        nameless = [i for i, text in enumerate(self._token_bytes) if text is None]
        names = host.tokenizer.convert_ids_to_tokens(nameless)
        self._names = dict(zip(nameless, map(str, names), strict=True))

    def __call__(self, token_id: int) -> str:
        """The text of a token; a part of a character is a sign that stands for it."""
        text = self._token_bytes[token_id]
        return self._names[token_id] if text is None else text.decode("utf-8", "replace")


@final
class Tracer:
    """Explains the tokens of one answer, one after another."""

    def __init__(self, speller: Speller, *, tells_text: bool) -> None:
        """Begin an answer.

        Args:
            speller: Of the host's tokens.
            tells_text: Whether what a memory found may be told, which is training text.
        """
        self.tells_text = tells_text
        self._speller = speller
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._host: Tensor | None = None
        self.voices: Sequence[Voice] = ()

    def hear(self, host_logprobs: Tensor) -> None:
        """Note the host's own distribution of the next token, shape [vocab]: nothing steers yet."""
        self._host, self.voices = host_logprobs, ()

    def hear_as(self, other: "Tracer") -> None:
        """Note the same as an answer that has read the same."""
        self._host, self.voices = other._host, other.voices

    def explained(self, token_id: int, piece: bytes, logprobs: Tensor) -> Explanation:
        """Explain the token that was chosen.

        Args:
            token_id: The token.
            piece: Its bytes; a character counts for the token that completes it.
            logprobs: The distribution that it was chosen from, shape [vocab].
        """
        assert self._host is not None
        text = self._decoder.decode(piece)
        both = (self._host.cpu(), logprobs.cpu())
        return explain(token_id, text, both, self.voices, self._speller)
