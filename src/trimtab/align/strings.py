"""A vocabulary as strings: which tokens begin with given bytes, and where a tokenizer cuts."""

import bisect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch
from torch import Tensor

from trimtab.vocab import Vocabulary

Encode = Callable[[str], Sequence[int]]

EncodeAll = Callable[[Sequence[str]], Sequence[Sequence[int]]]

KEPT_ANSWERS = 1 << 18
"""Answers of a tokenizer that are kept."""

KEPT_BEGINNINGS = 1 << 12
"""Beginnings whose tokens are kept."""

NEAR_NATS = 14.0
"""Tokens this far below the likeliest are looked at only where too few others are found."""

MOST_WITHOUT_TEXT = 0.9
"""Where all tokens without text are likelier than this, those of text are summed instead: less
would be left of one than single precision can tell."""

SPACES = (b" ", b"\n", b"\t")
"""White space that makes up the runs on which tokenizers differ."""


@dataclass(frozen=True)
class Strings:
    """A vocabulary in byte order, to find all tokens that begin with given bytes.

    Attributes:
        vocabulary: The bytes of every token id.
        encode: Its tokenizer, for text that follows other text. Without one the longest token
            that begins a text is taken to be the tokenizer's choice.
        encode_all: The same of many texts at once, where the tokenizer is faster at that.
    """

    vocabulary: Vocabulary
    encode: Encode | None = None
    encode_all: EncodeAll | None = None

    @cached_property
    def _sorted(self) -> tuple[list[bytes], list[int]]:
        pairs = sorted(self.vocabulary.ids_by_bytes.items())
        return [text for text, _ in pairs], [token_id for _, token_id in pairs]

    @cached_property
    def longest(self) -> int:
        """Bytes of the longest token."""
        return max((len(text) for text in self._sorted[0]), default=0)

    def bytes_of(self, token_id: int) -> bytes:
        """What a token stands for; nothing for a special token."""
        return self.vocabulary.token_bytes[token_id] or b""

    def longer_than(self, start: bytes) -> Tensor:
        """Ids of the tokens that begin with `start` and go beyond it, in byte order."""
        return self._longer(start)

    @cached_property
    def _longer(self) -> Callable[[bytes], Tensor]:
        return lru_cache(KEPT_BEGINNINGS)(self._find_longer)

    def _find_longer(self, start: bytes) -> Tensor:
        texts, ids = self._sorted
        first, last = bisect.bisect_right(texts, start), end_of(texts, start)
        return torch.tensor(ids[first:last], dtype=torch.long)

    def log_mass_beyond(self, start: bytes, logprobs: Tensor) -> float:
        """Logarithm of the probability of all tokens that begin with `start` and go beyond it.

        Args:
            start: The beginning.
            logprobs: Of each token, shape [vocab]; they sum to one.
        """
        longer = self.longer_than(start)
        if not len(longer):
            return -math.inf
        if not start:
            others = float(logprobs[self._without_text].exp().sum())
            if others < MOST_WITHOUT_TEXT:
                return math.log1p(-others)
        return float(logprobs[longer].logsumexp(0))

    def likeliest_beyond(self, start: bytes, logprobs: Tensor, count: int) -> Tensor:
        """Ids of the likeliest tokens that begin with `start` and go beyond it, in their order.

        Args:
            start: The beginning.
            logprobs: Of each token, shape [vocab].
            count: Most tokens.
        """
        longer = self.longer_than(start)
        if not start:
            # Nearly all tokens are text; those near the likeliest are soon found, and few to sort.
            near = torch.nonzero(logprobs >= logprobs.max() - NEAR_NATS)[:, 0]
            near = near[self._is_text[near]]
            longer = near if len(near) >= count else longer
        return longer[logprobs[longer].topk(min(len(longer), count)).indices]

    @cached_property
    def _is_text(self) -> Tensor:
        is_text = torch.zeros(len(self.vocabulary), dtype=torch.bool)
        is_text[self.longer_than(b"")] = True
        return is_text

    @cached_property
    def _without_text(self) -> Tensor:
        return torch.nonzero(~self._is_text)[:, 0]

    def longest_token(self, text: bytes) -> int:
        """The longest token that begins a text; -1 if none does."""
        ids = self.vocabulary.ids_by_bytes
        for length in range(min(len(text), self.longest), 0, -1):
            if text[:length] in ids:
                return ids[text[:length]]
        return -1

    def first_token(self, text: bytes) -> int:
        """The token with which the tokenizer begins a text; -1 if none does.

        Often not the longest: SmolLM2 reads `tank` as `t` and `ank`, though it has `tan`. The
        longest is the answer where the tokenizer cannot be asked.
        """
        return next(iter(self.first_tokens(text)), -1)

    def first_tokens(self, text: bytes) -> tuple[int, ...]:
        """The first two tokens of a text likewise, or as many as there are."""
        return self._first(text)

    def ways_to_begin(self, text: bytes) -> frozenset[tuple[int, ...]]:
        """The first two tokens of a text likewise, as it ends there and as a word follows it.

        The last of a run of white space may go to that word: SmolLM2 reads a brace and two line
        ends as two tokens, and before a word as three.
        """
        found = {self.first_tokens(text)}
        if text[-1:] in SPACES and text[-1:] in self.leaves:
            found.add(self.first_tokens(text + b"x"))
        return frozenset(found)

    @cached_property
    def _first(self) -> Callable[[bytes], tuple[int, ...]]:
        return lru_cache(KEPT_ANSWERS)(self._ask_first)

    def _ask_first(self, text: bytes) -> tuple[int, ...]:
        longest = self.longest_token(text)
        if longest < 0:
            return ()
        size = len(self.bytes_of(longest))
        if size == len(text):
            return (longest,)
        ids = self.encode(text.decode()) if self.encode and is_whole(text) else ()
        if self._spelled(ids) == text:
            return tuple(ids[:2])
        second = self.longest_token(text[size:])
        return (longest,) if second < 0 else (longest, second)

    def first_of_each(self, texts: Sequence[bytes]) -> list[int]:
        """As `first_token` of each text."""
        if self.encode_all is None:
            return [self.first_token(text) for text in texts]
        first = [self.longest_token(text) for text in texts]
        asked = [
            place
            for place, (text, longest) in enumerate(zip(texts, first, strict=True))
            if longest >= 0 and self.bytes_of(longest) != text and is_whole(text)
        ]
        read = self.encode_all([texts[place].decode() for place in asked])
        for place, ids in zip(asked, read, strict=True):
            if self._spelled(ids) == texts[place]:
                first[place] = ids[0]
        return first

    def _spelled(self, token_ids: Sequence[int]) -> bytes:
        return b"".join(map(self.bytes_of, token_ids))

    def still_ends(self, token_id: int, following: bytes) -> bool:
        """Whether the tokenizer ends a token where it does if `following` comes after it.

        The tokenizer is not told what stands before the token, so where only that decides the
        answer may be wrong; and where it cannot be asked (bytes that are no text by themselves) the
        answer is yes.
        """
        return self._still_ends(token_id, following)

    @cached_property
    def _still_ends(self) -> Callable[[int, bytes], bool]:
        return lru_cache(KEPT_ANSWERS)(self._ask_end)

    def _ask_end(self, token_id: int, following: bytes) -> bool:
        piece = self.bytes_of(token_id)
        if not piece:
            return True
        if self.encode is None:
            return self.longest_token(piece + following) == token_id
        if not is_whole(piece + following):
            return True
        text = (piece + following).decode()
        # The last of a run of white space may go to a word that is not here yet.
        asked = [text, f"{text}x"] if text[-1:].isspace() else [text]
        return any(self._begins_with(text, token_id) for text in asked)

    def _begins_with(self, text: str, token_id: int) -> bool:
        ids = self.encode(text) if self.encode else ()
        # A tokenizer that cannot leave out its own space, or cannot write the text, has no say.
        return self._spelled(ids) != text.encode() or list(ids[:1]) == [token_id]

    @cached_property
    def leaves(self) -> frozenset[bytes]:
        """The white space of which the last of a run goes to the word after it, as in GPT-2."""
        return frozenset(space for space in SPACES if self._leaves(space.decode()))

    def _leaves(self, space: str) -> bool:
        ends, size = set[int](), 0
        for token_id in self.encode(f"a{3 * space}x") if self.encode else ():
            size += len(self.bytes_of(token_id))
            ends.add(size)
        return 3 in ends and 2 not in ends


def is_whole(text: bytes) -> bool:
    """Whether bytes are text by themselves."""
    try:
        text.decode()
    except UnicodeDecodeError:
        return False
    return True


def end_of(texts: Sequence[bytes], start: bytes) -> int:
    """Where those end, among sorted texts, that begin with `start`."""
    stripped = start.rstrip(b"\xff")
    # The first string after all that begin with it.
    after = stripped[:-1] + bytes([stripped[-1] + 1]) if stripped else None
    return len(texts) if after is None else bisect.bisect_left(texts, after)


def token_lengths(vocabulary: Vocabulary) -> Tensor:
    """Bytes of each token, 0 for special ones, shape [vocab]."""
    return torch.tensor([len(text or b"") for text in vocabulary.token_bytes])
