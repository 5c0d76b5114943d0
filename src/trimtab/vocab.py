"""Which bytes each token of a model stands for: the coordinate system that all models share."""

import hashlib
from array import array
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property


@dataclass(frozen=True)
class Vocabulary:
    """The bytes of every token id.

    Attributes:
        token_bytes: Bytes by token id; None for special, unused and padding ids, which stand for
            no text. Its length is the number of rows of the unembedding.
        bos_id: Token that a model expects before a text, if it wants one.
        eos_id: Token that ends a text.
        prefix_space: The tokenizer puts a space before a text (SentencePiece's dummy prefix),
            so that the first token's bytes begin with one that is not in the text.
    """

    token_bytes: tuple[bytes | None, ...]
    bos_id: int | None = None
    eos_id: int | None = None
    prefix_space: bool = False

    def __len__(self) -> int:
        """Number of token ids, padding rows included."""
        return len(self.token_bytes)

    @cached_property
    def ids_by_bytes(self) -> Mapping[bytes, int]:
        """Token id by bytes; where several ids stand for the same bytes, the lowest."""
        ids: dict[bytes, int] = {}
        for token_id, text in enumerate(self.token_bytes):
            if text:
                ids.setdefault(text, token_id)
        return ids

    @cached_property
    def byte_ranks(self) -> "array[int]":
        """Place of each id in the order of the bytes; -1 for those that stand for no text."""
        with_text = [token_id for token_id, text in enumerate(self.token_bytes) if text]
        with_text.sort(key=lambda token_id: self.token_bytes[token_id] or b"")
        ranks = array("q", [-1]) * len(self)
        for rank, token_id in enumerate(with_text):
            ranks[token_id] = rank
        return ranks

    @cached_property
    def sha256(self) -> str:
        """Fingerprint of the full content: every id with its bytes, and the special ids."""
        digest = hashlib.sha256(f"{self.bos_id} {self.eos_id} {self.prefix_space}".encode())
        for text in self.token_bytes:
            digest.update(b"\xff" if text is None else len(text).to_bytes(4, "big") + text)
        return digest.hexdigest()
