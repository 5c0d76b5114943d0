"""Questions with one right answer among four, answered by likelihood. Pure."""

import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from bench.transfer.splits import in_turn

OPTIONS = 4
CONTEXT_CHARS = 240
"""Of the text before an answer; shorter contexts are passed over."""

AFTER_CHARS = 24
"""Of the text after it, which the answer has to fit as well."""

_WORD = re.compile(r"(?<=[\s(.])[^\W\d_][\w-]{6,}")


@dataclass(frozen=True)
class Choice:
    """A text with a gap, and ways to fill it.

    Attributes:
        before: The text before the gap.
        options: Ways to fill it, all different.
        after: The text after it.
        right: Index of the right one.
    """

    before: str
    options: tuple[str, ...]
    after: str
    right: int


def right_words(texts: Mapping[str, str], count: int, *, seed: int) -> list[Choice]:
    """Gaps in held-out texts, to be filled with one of four words of the same texts.

    A gap is a long word that the 240 characters before it do not say already; the other words
    begin alike, in upper or in lower case, and differ by two letters at most in length.

    Args:
        texts: Text by name.
        count: How many questions, at most; they are spread over the texts.
        seed: Of the draws.
    """
    rng = random.Random(seed)
    words = sorted({word for text in texts.values() for word in _WORD.findall(text)})
    found: list[list[Choice]] = []
    for text in texts.values():
        gaps = [gap for gap in _WORD.finditer(text) if gap.start() >= CONTEXT_CHARS]
        rng.shuffle(gaps)
        drawn = [_gap(text, gap, words, rng) for gap in gaps[: 2 * count]]
        found.append([choice for choice in drawn if choice])
    return in_turn(found)[:count]


def _gap(text: str, gap: re.Match[str], words: Sequence[str], rng: random.Random) -> Choice | None:
    word, before = gap.group(), text[gap.start() - CONTEXT_CHARS : gap.start()]
    alike = [
        other
        for other in words
        if other != word
        and other[0].isupper() == word[0].isupper()
        and abs(len(other) - len(word)) <= 2
        and other not in before
    ]
    if word in before or len(alike) < OPTIONS - 1:
        return None
    options = [word, *rng.sample(alike, OPTIONS - 1)]
    rng.shuffle(options)
    after = text[gap.end() : gap.end() + AFTER_CHARS]
    return Choice(before, tuple(options), after, options.index(word))


def right_labels(
    texts: Mapping[str, str], label_of: Mapping[str, str], ask: str, count: int, *, seed: int
) -> list[Choice]:
    """Which of four classes is a piece of text of?

    Args:
        texts: Text by name.
        label_of: Class by name, in words; texts without one are passed over.
        ask: What stands between a piece and its class.
        count: How many questions, at most; they are spread over the texts.
        seed: Of the draws.
    """
    rng = random.Random(seed)
    labels = sorted(set(label_of.values()))
    found: list[list[Choice]] = []
    for name, text in texts.items():
        if name not in label_of or len(labels) < OPTIONS:
            continue
        starts = list(range(0, len(text) - CONTEXT_CHARS, CONTEXT_CHARS))
        rng.shuffle(starts)
        others = [label for label in labels if label != label_of[name]]
        found.append([])
        for start in starts[:count]:
            options = [label_of[name], *rng.sample(others, OPTIONS - 1)]
            rng.shuffle(options)
            piece = text[start : start + CONTEXT_CHARS]
            right = options.index(label_of[name])
            found[-1].append(Choice(f"{piece}{ask}", tuple(options), "\n", right))
    return in_turn(found)[:count]
