"""Drafts that cost nothing: what a text went on with where it ended once before as it ends now.

Prompt lookup decoding (Saxena 2023; transformers' `prompt_lookup_num_tokens`), on bytes.
"""

from collections.abc import Sequence
from typing import final

LEAST_BYTES, MOST_BYTES = 16, 128
"""Bytes in which two places must agree before their continuations are expected to."""


@final
class Repeats:
    """Looks into a text that grows, and asks for more agreement where it was wrong."""

    def __init__(self) -> None:
        """Begin with the least agreement."""
        self._least = LEAST_BYTES
        self._expected: tuple[int, Sequence[bytes]] = (0, ())

    def after(self, context: bytes, most_bytes: int) -> str:
        """What may follow: what did at the last place that ends alike, if there is one.

        Args:
            context: The text so far, from one call to the next longer.
            most_bytes: Most bytes of what follows.
        """
        self._learn(context)
        found = _following(context, self._least)
        # What follows a place near the end is soon the end itself: a text that repeats itself.
        text = (found * (most_bytes // max(len(found), 1) + 1))[:most_bytes]
        # A character's later bytes are not drafted without its first.
        text = b"" if text[:1] and 0x80 <= text[0] < 0xC0 else text
        return text.decode("utf-8", "ignore")

    def expect(self, place: int, pieces: Sequence[bytes]) -> None:
        """Say what was drafted, to learn from what comes.

        Args:
            place: Bytes of the text before it.
            pieces: The bytes of each token of the draft; none where nothing was drafted.
        """
        self._expected = (place, pieces)

    def _learn(self, context: bytes) -> None:
        """Ask for twice the agreement where no token came as drafted, for half where all did."""
        place, pieces = self._expected
        came = context[place:]
        if not pieces or not came:
            return
        if not came.startswith(pieces[0]):
            self._least = min(2 * self._least, MOST_BYTES)
        elif came.startswith(b"".join(pieces)):
            self._least = max(self._least // 2, LEAST_BYTES)


def _following(context: bytes, size: int) -> bytes:
    """All that follows the last place before the end which agrees with the end in so many bytes."""
    if len(context) <= size:
        return b""
    place = context.rfind(context[-size:], 0, len(context) - 1)
    return b"" if place < 0 else context[place + size :]
