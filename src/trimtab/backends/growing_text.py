"""A text that grows from one question to the next, of which only the end is encoded anew."""

import re
from collections.abc import Sequence
from typing import final

from trimtab.align.strings import Encode
from trimtab.vocab import Vocabulary

_CUT = re.compile(r"[A-Za-z0-9](?= [A-Za-z])")
"""What a tokenizer ends a token after, whatever stands around these three characters."""

_NO_CUT = re.compile(rb"[A-Za-z0-9] (?:[A-Za-z]|\Z)")
"""Where a token's bytes are so, it may go over such a cut."""

_REACH = 256
"""Last characters of a text in which a cut is sought."""

_PROBES = (
    "The rudder, turned by 37 degrees, is n't 5 m long; at 12 knots it's (about) half of it.",
    "fn main() !void {\n    const a = try alloc(u8, n);\t// see x\n\n"
    "  return  b if c\r\n}  else d e",
    "Ein großes Ruder für 3 Schiffe 船の舵 and more\u2028text e\u0301 x 🚢 y Z ﬁ Q",
)


@final
class GrowingText:
    """A tokenizer that keeps the last text, for the next that begins like it."""

    def __init__(
        self, whole: Encode, following: Encode | None, token_bytes: Sequence[bytes | None]
    ) -> None:
        """Nothing has been encoded yet.

        Args:
            whole: Encodes a text from its beginning.
            following: Encodes what follows a cut; None where a tokenizer does not cut there
                (`cuts_before_words`), and all of every text is encoded.
            token_bytes: The bytes of each token.
        """
        self._whole, self._following, self._token_bytes = whole, following, token_bytes
        self._text, self._tokens = "", list[int]()

    def encode(self, text: str) -> list[int]:
        """The tokens of a text: those that encoding the whole of it gives."""
        cut, found = self._kept_of(text)
        if cut and self._following is not None:
            found += self._following(text[cut:])
        else:
            found = list(self._whole(text))
        self._text, self._tokens = text, found
        return list(found)

    def _kept_of(self, text: str) -> tuple[int, list[int]]:
        """The last cut that a text shares with the one before, and the tokens up to there."""
        if self._following is None:
            return 0, []
        cuts = [cut.end() for cut in _CUT.finditer(self._text, max(0, len(self._text) - _REACH))]
        for cut in reversed(cuts):
            # With the two characters after it, by which it is a cut.
            if text.startswith(self._text[: cut + 2]):
                count = self._tokens_before(cut)
                return (0, []) if count is None else (cut, self._tokens[:count])
        return 0, []

    def _tokens_before(self, cut: int) -> int | None:
        """Tokens of the text before a cut; None where the tokens after it spell something else."""
        after, spelled, count = self._text[cut:].encode(), b"", len(self._tokens)
        while count and len(spelled) < len(after):
            count -= 1
            spelled = (self._token_bytes[self._tokens[count]] or b"") + spelled
        return count if spelled == after else None


def cuts_before_words(encode: Encode, following: Encode, vocabulary: Vocabulary) -> bool:
    """Whether a tokenizer reads a word after a space by itself, whatever text stands before it.

    A word here is a space and a letter, after a letter or digit. Where no token has these three in
    it, every tokenizer ends a token there, and merges of pairs, or the likeliest pieces, are those
    of both sides by themselves. That what it does to a text before that is so too is tried.

    Args:
        encode: Encodes a text from its beginning.
        following: Encodes a text that follows another one.
        vocabulary: The bytes of its tokens.
    """
    if any(_NO_CUT.search(piece) for piece in vocabulary.token_bytes if piece and b" " in piece):
        return False
    return all(
        list(encode(probe)) == [*encode(probe[:cut]), *following(probe[cut:])]
        for probe in _PROBES
        for cut in (found.end() for found in _CUT.finditer(probe))
    )
