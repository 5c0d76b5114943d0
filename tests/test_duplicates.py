"""Text that repeats test text is found as surely as by comparing all pairs."""

import random
import re

import pytest

from trimtab.text.duplicates import drop_near_duplicates, near_repeats
from trimtab.types import Document

WORDS = [f"w{i}" for i in range(400)]


def brute_force_jaccard(first: str, second: str, length: int) -> float:
    sets = []
    for text in (first, second):
        tokens = re.findall(r"\w+|[^\w\s]", text)
        length_here = min(length, len(tokens))
        runs = range(len(tokens) - length_here + 1)
        sets.append({tuple(tokens[i : i + length_here]) for i in runs} if tokens else set())
    union = len(sets[0] | sets[1])
    return len(sets[0] & sets[1]) / union if union else 0.0


def related_texts(seed: int) -> tuple[list[Document], list[Document]]:
    """Test texts, and training texts that repeat them to every degree, some not at all."""
    draw = random.Random(seed)
    test = [
        Document(f"test{i}", " ".join(draw.choices(WORDS, k=draw.randint(3, 200))))
        for i in range(12)
    ]
    train = []
    for i in range(100):
        words = draw.choice(test).text.split()
        for _ in range(draw.randint(0, len(words) // 8)):
            words[draw.randrange(len(words))] = draw.choice(WORDS)
        train.append(Document(f"train{i}", " ".join(words) + draw.choice(["", ".", " x"])))
    return train, test


@pytest.mark.parametrize("threshold", [0.05, 0.3, 0.5, 0.8, 1.0])
@pytest.mark.parametrize("seed", [0, 1])
def test_deduplication_equals_brute_force(seed: int, threshold: float) -> None:
    train, test = related_texts(seed)
    result = drop_near_duplicates(train, test, threshold=threshold)
    dropped = {item.name: item for item in result.dropped}
    seen: set[str] = set()
    kept: list[Document] = []
    for document in train:
        scores = [brute_force_jaccard(document.text, other.text, 5) for other in test]
        if max(scores) >= threshold:
            assert dropped[document.name].jaccard == pytest.approx(max(scores), abs=0)
            assert dropped[document.name].like == test[scores.index(max(scores))].name
        elif document.text not in seen:
            kept.append(document)
        seen.add(document.text)
    assert list(result.kept) == kept
    assert 0 < len(kept) < len(train) or threshold == 0.05


def test_all_repetitions_of_a_text_are_named() -> None:
    documents, texts = related_texts(3)
    slow = [
        [n for n, d in enumerate(documents) if brute_force_jaccard(d.text, text.text, 5) >= 0.5]
        for text in texts
    ]
    assert near_repeats(documents, texts) == slow
    assert max(map(len, slow)) > 1
    assert near_repeats([], texts) == [[] for _ in texts]


def test_repetitions_within_training_text_are_dropped_once() -> None:
    train = [
        Document("a", "x y"),
        Document("b", "x y"),
        Document("c", "x y", ((0, 1),)),
        Document("empty", ""),
        Document("symbols", "()"),
    ]
    result = drop_near_duplicates(train, [Document("t", "")])
    assert [(d.name, d.like) for d in result.dropped] == [("b", "a"), ("empty", "t")]
    assert [d.name for d in drop_near_duplicates(train, []).kept] == ["a", "c", "empty", "symbols"]


def test_one_repetition_among_long_texts_is_found() -> None:
    draw = random.Random(0)
    train = [Document(f"{i}", " ".join(draw.choices(WORDS, k=20_000))) for i in range(20)]
    result = drop_near_duplicates(train, [Document("t", train[7].text + " end")])
    assert [item.name for item in result.dropped] == ["7"]


def test_deduplication_refuses_a_senseless_threshold() -> None:
    for threshold in (0.0, 1.1):
        with pytest.raises(ValueError, match="threshold"):
            drop_near_duplicates([], [], threshold=threshold)
