"""A corpus splits the same way every time, comes back as saved, and is scored token by token."""

import random
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trimtab.errors import InputError
from trimtab.text.corpus import (
    load_documents,
    save_documents,
    scored_windows,
    sha256_of_documents,
    split_held_out,
)
from trimtab.types import Document


def learned(document: Document) -> list[str]:
    return [document.text[start:end] for start, end in document.loss_spans]


DOCUMENTS = [Document(f"d{i}", f"text {i}") for i in range(40)]


@given(
    st.integers(2, 40),
    st.floats(0.001, 0.999),
    st.integers(0, 5),
    st.randoms(use_true_random=False),
)
def test_split_is_by_document_and_stable(
    count: int, share: float, seed: int, draw: random.Random
) -> None:
    documents = DOCUMENTS[:count]
    train, held_out = split_held_out(documents, share, seed)
    assert train and held_out
    assert sorted(train + held_out, key=documents.index) == documents
    assert abs(len(held_out) - share * count) <= 1
    shuffled = documents.copy()
    draw.shuffle(shuffled)
    again_train, again_held_out = split_held_out(shuffled, share, seed)
    assert set(again_train) == set(train)
    assert set(again_held_out) == set(held_out)


def test_split_does_not_depend_on_names() -> None:
    renamed = [replace(one, name=f"elsewhere/{number}") for number, one in enumerate(DOCUMENTS)]
    drawn = [split_held_out(documents, 0.3, 1) for documents in (DOCUMENTS, renamed)]
    sides = [[[one.text for one in side] for side in split] for split in drawn]
    assert sides[0] == sides[1]


def test_equal_texts_can_be_held_out() -> None:
    train, held_out = split_held_out([Document(str(number), "same") for number in range(4)], 0.3, 0)
    assert [len(train), len(held_out)] == [3, 1]


def test_split_depends_on_the_seed_and_can_be_off() -> None:
    splits = {tuple(split_held_out(DOCUMENTS, 0.2, seed)[1]) for seed in range(10)}
    assert len(splits) == 10
    assert split_held_out(DOCUMENTS, 0, 0) == (DOCUMENTS, [])
    assert split_held_out([], 0.5, 0) == ([], [])
    with pytest.raises(ValueError, match="share"):
        split_held_out(DOCUMENTS, 1.0, 0)


def test_one_document_is_cut_at_a_line_break() -> None:
    text = "".join(f"line {i}\n" for i in range(100))
    train, held_out = split_held_out([Document("a", text)], 0.1, 0)
    assert [d.name for d in train + held_out] == ["a#train", "a#held-out"]
    assert train[0].text + held_out[0].text == text
    assert held_out[0].text.startswith("line 9") and len(held_out[0].text) == 80


@given(
    st.text("ab\n", min_size=3, max_size=60),
    st.floats(0.01, 0.99),
    st.sets(st.integers(0, 60), max_size=6),
)
def test_a_cut_keeps_all_text_and_all_spans(text: str, share: float, edges: set[int]) -> None:
    ends = sorted(edge for edge in edges if edge <= len(text))
    spans = tuple(zip(ends[::2], ends[1::2], strict=False))
    document = Document("a", text, spans)
    if spans and spans[-1][1] - spans[0][0] < 2:
        with pytest.raises(InputError, match="too short"):
            split_held_out([document], share, 0)
        return
    train, held_out = split_held_out([document], share, 0)
    assert train[0].text + held_out[0].text == text
    assert train[0].text and held_out[0].text
    assert bool(train[0].loss_spans) == bool(held_out[0].loss_spans) == bool(spans)
    expected = "".join(learned(document))
    assert "".join(learned(train[0]) + learned(held_out[0])) == expected


def test_saved_documents_come_back_and_have_one_form(tmp_path: Path) -> None:
    documents = [Document("a", 'x\n"\u2028ß'), Document("b:1", "2+2=4", ((4, 5),))]
    save_documents(tmp_path / "d.jsonl", documents)
    assert load_documents(tmp_path / "d.jsonl") == documents
    assert (tmp_path / "d.jsonl").read_bytes().splitlines()[1] == (
        b'{"loss_spans": [[4, 5]], "name": "b:1", "text": "2+2=4"}'
    )
    save_documents(tmp_path / "none.jsonl", [])
    assert load_documents(tmp_path / "none.jsonl") == []


@pytest.mark.parametrize(
    "line",
    [
        "[]",
        '{"name": "a", "text": "b"}',
        '{"name": "a", "text": "b", "loss_spans": [], "more": 1}',
        '{"name": "a", "text": 1, "loss_spans": []}',
        '{"name": "a", "text": "b", "loss_spans": [[0, 2]]}',
        '{"name": "a", "text": "b", "loss_spans": [[0, true]]}',
        '{"name": "a", "text": "b", "loss_spans": [[1]]}',
    ],
)
def test_changed_saved_documents_are_refused(tmp_path: Path, line: str) -> None:
    good = '{"name": "a", "text": "b", "loss_spans": [[0, 1]]}'
    (tmp_path / "d.jsonl").write_text(f"{good}\n{line}\n")
    with pytest.raises(InputError, match=r"line 2 of .*d\.jsonl"):
        load_documents(tmp_path / "d.jsonl")


def test_fingerprint_sees_every_change() -> None:
    base = [Document("a", "bc"), Document("d", "ef")]
    variants = [
        base,
        base[::-1],
        base[:1],
        [Document("ab", "c"), base[1]],
        [Document("a", "bc", ((0, 1),)), base[1]],
        [Document("a", "bd"), base[1]],
    ]
    assert len({sha256_of_documents(documents) for documents in variants}) == len(variants)
    assert sha256_of_documents(base) == sha256_of_documents(list(base))


@given(st.integers(0, 300), st.integers(2, 60), st.data())
def test_windows_score_every_token_once_with_context(
    n_tokens: int, window_tokens: int, data: st.DataObject
) -> None:
    stride_tokens = data.draw(st.integers(1, window_tokens))
    scored: Counter[int] = Counter()
    for window in scored_windows(n_tokens, window_tokens, stride_tokens):
        assert 0 <= window.start < window.score_from < window.end <= n_tokens
        assert window.end - window.start <= window_tokens
        scored.update(range(window.score_from, window.end))
        for token in range(window.score_from, window.end):
            wanted = max(window_tokens - stride_tokens, 1)
            assert token - window.start >= min(wanted, token)
    assert scored == Counter(range(1, n_tokens))


def test_windows_of_the_measurement() -> None:
    assert scored_windows(1000, 512, 256) == [(0, 512, 1), (256, 768, 512), (512, 1000, 768)]
    assert scored_windows(512, 512, 256) == [(0, 512, 1)]
    for window_tokens, stride_tokens in ((1, 1), (8, 0), (8, 9)):
        with pytest.raises(ValueError, match="stride"):
            scored_windows(10, window_tokens, stride_tokens)


def test_a_corpus_does_not_load_torch() -> None:
    code = "import sys, trimtab.text.corpus; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
