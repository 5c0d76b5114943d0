"""The ways in which a small model may have read the bytes of a context.

The idea of covers is that of byte-level sampling from token models (Vieira et al. 2024, "From
Language Models over Tokens to Language Models over Characters"; Hayase et al. 2025, "Sampling
from Your Language Model One Byte at a Time"); see docs/method.md for what is exact here and what
is not.
"""

import codecs
from collections.abc import Sequence
from dataclasses import dataclass

from trimtab.align.strings import Encode
from trimtab.vocab import Vocabulary

MAX_BACK = 2
"""Last tokens of the context that a longer token may replace."""


@dataclass(frozen=True)
class Cover:
    """One way in which a small model may have read a context.

    Attributes:
        tokens: What it has read.
        rest: Bytes that its next token must begin with, and go beyond.
    """

    tokens: tuple[int, ...]
    rest: bytes


def covers_of(context: bytes, encode: Encode, small: Vocabulary) -> list[Cover]:
    """Ways to read a context, from the context alone.

    The first is the tokenizer's own; then its last tokens are given back for a longer token to
    take their place; then the bytes of a character that the end cuts, as tokens; then what the
    tokenizer would do if a word followed (a run of spaces then leaves its last space to that
    word).

    Args:
        context: The bytes so far; the end may cut a character. Other bytes that are not UTF-8
            (a window that begins inside a character, a host's slip) are passed over.
        encode: The small model's tokenizer.
        small: The small model's vocabulary.
    """
    text, cut = _readable(context)
    tokens = tuple(encode(text))
    covers = [Cover(tokens, cut)]
    for back in range(1, min(MAX_BACK, len(tokens)) + 1):
        rest = b"".join(small.token_bytes[t] or b"" for t in tokens[-back:]) + cut
        covers.append(Cover(tokens[:-back], rest))
    covers += _into_a_character(tokens, cut, small)
    if text[-1:].isspace() and not cut:
        covers += _before_a_word(text, encode, small.token_bytes, {c.tokens for c in covers})
    return covers


def _into_a_character(tokens: tuple[int, ...], cut: bytes, small: Vocabulary) -> list[Cover]:
    """Ways to read at least one token of a character's first bytes."""
    covers = []
    for size in range(1, len(cut) + 1):
        token_id = small.ids_by_bytes.get(cut[:size])
        if token_id is not None:
            longer, rest = (*tokens, token_id), cut[size:]
            covers += [Cover(longer, rest), *_into_a_character(longer, rest, small)]
    return covers


def _before_a_word(
    text: str,
    encode: Encode,
    token_bytes: Sequence[bytes | None],
    known: set[tuple[int, ...]],
) -> list[Cover]:
    pieces = [(token, token_bytes[token] or b"") for token in encode(text + "x")]
    spelled = b"".join(piece for _, piece in pieces)
    # It may begin with a tokenizer's own space; one that cannot write all of it has no say.
    if not spelled.endswith(text.encode() + b"x"):
        return []
    kept, size, end = [], 0, len(spelled) - 1
    for token, piece in pieces:
        if size + len(piece) > end:
            break
        kept.append(token)
        size += len(piece)
    covers = [Cover(tuple(kept), spelled[size:end])]
    if size == end and kept:
        # "x" stood alone; another word may take the space before it along.
        last = token_bytes[kept[-1]] or b""
        covers.append(Cover(tuple(kept[:-1]), last))
    return [cover for cover in covers if cover.tokens not in known]


def _readable(context: bytes) -> tuple[str, bytes]:
    """The text before a character that the end cuts, and that character's first bytes."""
    decoder = codecs.getincrementaldecoder("utf-8")("ignore")
    text = decoder.decode(context)
    return text, decoder.getstate()[0]
