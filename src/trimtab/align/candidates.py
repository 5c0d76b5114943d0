"""Tokens that a step considers, and which tokens of another vocabulary begin them."""

import bisect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from trimtab.align.strings import Strings, end_of
from trimtab.vocab import Vocabulary

NOT_ASKED = -2
"""Stands for a first token that nobody has asked for yet."""


@dataclass(frozen=True, eq=False)
class Candidates:
    """The host tokens that a step considers, in byte order where that helps.

    Attributes:
        token_ids: Host token ids, shape [candidates].
        texts: Their bytes, sorted; special tokens are left out.
        order: Place in `token_ids` of each of `texts`.
    """

    token_ids: Tensor
    texts: tuple[bytes, ...]
    order: Tensor

    @staticmethod
    def of(token_ids: Tensor, host: Vocabulary) -> "Candidates":
        """Sort the candidates of a host."""
        ranks = torch.frombuffer(host.byte_ranks, dtype=torch.int64)[token_ids]
        order = ranks.argsort(stable=True)[int((ranks < 0).sum()) :]
        # No loop of Python's own: there are thousands, at every step. All of them are text.
        texts = filter(None, map(host.token_bytes.__getitem__, token_ids[order].tolist()))
        return Candidates(token_ids, tuple(texts), order)

    def beginning_with(self, start: bytes) -> range:
        """Which of `texts` begin with `start`, it included."""
        return range(bisect.bisect_left(self.texts, start), end_of(self.texts, start))

    def first_of(self, text: bytes, host: Strings) -> int:
        """Place of the candidate with which a host begins to read a text; -1 if it is none."""
        first = host.first_token(text)
        own = host.bytes_of(first) if first >= 0 else b""
        place = bisect.bisect_left(self.texts, own)
        found = own and place < len(self.texts) and self.texts[place] == own
        return int(self.order[place]) if found else -1


@dataclass(frozen=True)
class FirstTokens:
    """Which token of one vocabulary begins each token of another, asked when it is first needed.

    Attributes:
        vocabulary: The tokens that are asked about.
        first_tokens: Says which token begins each text, -1 for none.
    """

    vocabulary: Vocabulary
    first_tokens: Callable[[Sequence[bytes]], Sequence[int]]

    @cached_property
    def _known(self) -> Tensor:
        # Made inside inference mode, it could not be added to outside.
        with torch.inference_mode(False):
            return torch.full((len(self.vocabulary),), NOT_ASKED)

    def __call__(self, token_ids: Tensor) -> Tensor:
        """The first token of each, -1 for none, of the shape of `token_ids` (one dimension)."""
        found = self._known[token_ids]
        new = token_ids[found == NOT_ASKED]
        if not len(new):
            return found
        texts = {i: self.vocabulary.token_bytes[i] for i in new.tolist()}
        asked = {i: text for i, text in texts.items() if text}
        first = self.first_tokens(list(asked.values()))
        # Only now: a question that is broken off is asked again.
        self._known[new] = -1
        self._known[list(asked)] = torch.tensor(first, dtype=torch.long)
        return self._known[token_ids]
