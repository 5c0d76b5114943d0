"""From the bytes of a continuation to its text, piece by piece. Pure."""

import codecs
from collections.abc import Sequence
from typing import final


@final
class TextStream:
    """Text as its bytes come in: whole characters only, and nothing from a stop string on.

    The stop string that is complete first ends the text; of two that end at the same character,
    the longer one. Bytes that are not UTF-8 become U+FFFD.
    """

    def __init__(self, stop: Sequence[str] = ()) -> None:
        """Begin an empty text.

        Args:
            stop: Strings that end the text, none of them empty.
        """
        self._stop = tuple(stop)
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._held = ""
        self._given: list[str] = []
        self._stopped = False

    @property
    def text(self) -> str:
        """All that was given out so far."""
        return "".join(self._given)

    @property
    def stopped(self) -> bool:
        """A stop string has come."""
        return self._stopped

    def add(self, piece: bytes) -> str:
        """Take bytes and give out the text that is certain by now, which may be none.

        The beginning of what may become a stop string, or a character, is held back.
        """
        return self._give(self._decoder.decode(piece), final=False)

    def finish(self) -> str:
        """Give out what was held back; no more bytes come."""
        return self._give(self._decoder.decode(b"", final=True), final=True)

    def _give(self, characters: str, *, final: bool) -> str:
        given = ""
        for character in characters:
            given += self._one(character)
        if final and not self._stopped:
            given, self._held = given + self._held, ""
        self._given.append(given)
        return given

    def _one(self, character: str) -> str:
        if self._stopped:
            return ""
        self._held += character
        ended = [len(s) for s in self._stop if self._held.endswith(s)]
        if ended:
            self._stopped = True
            return self._held[: -max(ended)]
        kept = max((_overlap(self._held, s) for s in self._stop), default=0)
        given = self._held[: len(self._held) - kept]
        self._held = self._held[len(given) :]
        return given


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of a text that begins a stop string."""
    longest = min(len(text), len(stop))
    return next(size for size in range(longest, -1, -1) if text.endswith(stop[:size]))
