"""What a text went on with before, against a search place by place; what is wrong counts less."""

from hypothesis import given
from hypothesis import strategies as st

from trimtab.steering.repeats import LEAST_BYTES, MOST_BYTES, Repeats

LINE = b"    try expectEqual(@as(u8, 1), value);\n"


def oracle(context: bytes, size: int, most: int) -> bytes:
    """Byte by byte, the last place first."""
    for end in range(len(context) - 1, size - 1, -1):
        if context[end - size : end] == context[-size:]:
            found = bytearray()
            while len(found) < most:
                found.append((context + found)[end + len(found)])
            return bytes(found)
    return b""


@given(st.lists(st.sampled_from([b"a", b"b", b"ab" * 9, LINE]), max_size=12).map(b"".join))
def test_it_goes_on_as_at_the_last_place_that_ends_alike(context: bytes) -> None:
    found = Repeats().after(context, 40).encode()
    assert found == oracle(context, LEAST_BYTES, 40)


def test_nothing_is_expected_of_a_text_that_is_new() -> None:
    assert Repeats().after(b'const std = @import("std");', 40) == ""
    assert Repeats().after(b"", 40) == ""


def test_a_character_is_not_drafted_without_its_beginning() -> None:
    word = "the same words, then ü".encode()
    assert Repeats().after(word + b"!" + word[:-1], 8) == ""
    assert Repeats().after(word + b"!" + word[:-2], 2) == "ü"


def drafted(repeats: Repeats, context: bytes, most_bytes: int) -> str:
    """A draft of two pieces, the first of them a space and what is after it."""
    text = repeats.after(context, most_bytes)
    raw = text.encode()
    repeats.expect(len(context), [piece for piece in (raw[:2], raw[2:]) if piece])
    return text


def test_a_wrong_draft_asks_for_twice_the_agreement() -> None:
    repeats, context = Repeats(), LINE[:20] + b" A" + LINE[:20]
    assert drafted(repeats, context, 2) == " A"
    longer = context + b" B" + LINE[:20]
    assert drafted(repeats, longer, 4) == "", "its first byte alone was right"
    assert drafted(repeats, longer + b" B" + LINE[:20] + b" B" + LINE[:20], 2) == " B"


def test_agreement_has_bounds() -> None:
    repeats, context, new = Repeats(), LINE * 6, b"x" + LINE[-LEAST_BYTES - 2 :]
    for _ in range(6):
        assert drafted(repeats, context, 4), "six lines agree in more than the most"
        context += b"~" + LINE * 6
    assert len(LINE * 6) > MOST_BYTES
    assert Repeats().after(context + new, 4)
    assert not drafted(repeats, context + new, 4), "it was wrong six times"
    context += new
    for _ in range(6):
        context += LINE * 6
        assert drafted(repeats, context, 4)
    assert repeats.after(context + new, 4), "and right five times"


def test_what_came_in_part_changes_nothing() -> None:
    repeats, context = Repeats(), LINE * 6
    assert drafted(repeats, context, 4) == "    "
    context += b"  ~" + LINE
    assert drafted(repeats, context, 4)
    assert repeats.after(LINE[:20] + b"A" + LINE[:20], 1) == "A"
