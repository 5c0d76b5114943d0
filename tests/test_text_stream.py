"""Streams of text against a slow reading of all that came."""

import random

from hypothesis import given
from hypothesis import strategies as st

from trimtab.text.stream import TextStream


def cut(text: str, stop: list[str]) -> str:
    """A text up to the stop string that is complete first; the longest of those."""
    for end in range(1, len(text) + 1):
        ended = [s for s in stop if text[:end].endswith(s)]
        if ended:
            return text[: end - max(map(len, ended))]
    return text


@given(st.text("abä€\n", max_size=30), st.lists(st.text("abä€", min_size=1)), st.randoms())
def test_streams_cut_at_stop_strings(text: str, stop: list[str], chance: random.Random) -> None:
    stream, raw, parts, begin = TextStream(stop), text.encode(), [], 0
    while begin < len(raw):
        end = begin + chance.randint(1, 5)
        parts.append(stream.add(raw[begin:end]))
        begin = end
    parts.append(stream.finish())
    assert "".join(parts) == stream.text == cut(text, stop)
    assert stream.stopped == any(s in text for s in stop)


def test_streams_wait_for_whole_characters() -> None:
    stream = TextStream()
    assert [stream.add(bytes([b])) for b in "ä€".encode()] == ["", "ä", "", "", "€"]
    assert (stream.add(b"\xe2\x82"), stream.finish()) == ("", "�")
