"""Tasks of the transfer suite: gaps and classes, the general question sets, completed functions."""

import json
import random
from pathlib import Path

import pytest

from bench.transfer import questions
from bench.transfer.choices import Choice, right_labels, right_words
from bench.transfer.compiler import Function, functions_in
from bench.transfer.metrics import share_right
from trimtab.errors import InputError
from trimtab.lmeval.tasks import read_task

NOUNS = [f"{a}{b}{c}ung" for a in ("Ver", "Be", "Ent") for b in "aeiou" for c in ("st", "nd", "lt")]


def book(seed: int, count: int = 120) -> str:
    draw = random.Random(seed)
    return "".join(f"Die {draw.choice(NOUNS)} folgt.\n" for _ in range(count))


def test_a_gap_is_in_its_text_and_nothing_gives_the_word_away() -> None:
    texts = {name: book(seed) for seed, name in enumerate("abc")}
    found = right_words(texts, 20, seed=0)
    assert len(found) == 20
    for choice in found:
        word = choice.options[choice.right]
        assert any(f"{choice.before}{word}{choice.after}" in text for text in texts.values())
        assert len(set(choice.options)) == 4
        for other in choice.options:
            assert other not in choice.before and other[0].isupper() == word[0].isupper()
            assert abs(len(other) - len(word)) <= 2
    places = [choice.right for choice in found]
    assert len(set(places)) == 4
    assert right_words(texts, 20, seed=0) == found != right_words(texts, 20, seed=1)


def test_a_class_is_asked_for_beside_three_others() -> None:
    labels = dict(zip("abcde", ("eye", "ear", "skin", "heart", "lung"), strict=True))
    texts = {name: book(seed) for seed, name in enumerate("ab?")}
    found = right_labels(texts, labels, "\nThis is about the ", 9, seed=0)
    assert len(found) == 9
    for choice in found:
        assert choice.options[choice.right] in ("eye", "ear")
        assert len(set(choice.options)) == 4 and set(choice.options) <= set(labels.values())
        piece = choice.before.removesuffix("\nThis is about the ")
        name = "a" if choice.options[choice.right] == "eye" else "b"
        assert piece in texts[name]


def test_questions_are_written_as_task_files(tmp_path: Path) -> None:
    choices = [Choice("The ", ("keel", "hull"), " sinks.\n", 1), Choice("A b", (" c", " d"), "", 0)]
    path = questions.write_task("ships", choices, tmp_path)
    assert read_task(path).name == "ships"
    lines = [json.loads(line) for line in (tmp_path / "ships.jsonl").read_text().splitlines()]
    # What lm-eval puts together is the whole text, letter by letter.
    joined = [[f"{one['before']}{option}" for option in one["choices"]] for one in lines]
    assert joined == [["The keel sinks.\n", "The hull sinks.\n"], ["A b c", "A b d"]]
    assert [one["gold"] for one in lines] == [1, 0]


def test_a_share_has_an_error_of_draws() -> None:
    share = share_right([True, True, False])
    assert share.mean == pytest.approx(2 / 3) and share.stderr == pytest.approx(0.272, abs=0.03)


def test_classes_are_named_after_folders() -> None:
    assert questions.label_of("zig", "std/crypto/aes.zig") == "crypto"
    assert questions.label_of("zig", "std/Uri.zig") is None
    assert questions.label_of("german-medical", "S/S-007.txt") == "Haut"
    assert questions.label_of("licences", "creative-commons/cc0.txt") == "creative commons"


def test_general_questions_are_read_and_short_ones_left_out(tmp_path: Path) -> None:
    folder = tmp_path / f"{questions.PACKAGE}-{questions.VERSION}"
    folder.mkdir()

    def asked(number: int, words: int) -> str:
        doc = {"choices": ["one", "two", "three", "four"], "gold": 2}
        context = f"Question: {'why ' * words}?\nAnswer:"
        return json.dumps({"doc": doc, "request": {"context": context}, "native_id": number})

    lines = [asked(n // 4, 3 if n // 4 == 1 else 20) for n in range(16)]
    for task in questions.SETS:
        (folder / f"{task}.jsonl").write_text("\n".join(lines))
    found = questions.general_questions(2, tmp_path)
    assert set(found) == {"arc-easy", "sciq"}
    for choices in found.values():
        assert len(choices) == 2 and all(choice.right == 2 for choice in choices)
        assert choices[0].options == (" one", " two", " three", " four")
    (folder / "sciq.jsonl").write_text("{}\n")
    with pytest.raises(InputError, match=r"sciq.jsonl, line 1: no question"):
        questions.general_questions(2, tmp_path)


ZIG = """const std = @import("std");
{padding}
pub fn first(a: u32) u32 {{
    if (a > 2) {{
        return a;
    }}
    return 2 * a;
}}

const Point = struct {{
    x: u32,

    fn second(self: Point) u32 {{
        const y = self.x;
        return y + 1;
    }}
}};
"""


def test_functions_are_found_with_their_indentation() -> None:
    text = ZIG.format(padding="// a line\n" * 30)
    first, second = functions_in(text)
    assert first.body.startswith("    if") and first.body.endswith("return 2 * a;")
    assert (first.end, second.end) == ("\n}\n", "\n    }\n")
    for function in (first, second):
        assert function.filled(function.body) == text
        longer = f"{function.body}{function.end}more of another function"
        assert function.filled(longer) == text
        assert function.before.endswith(function.prompt) and function.prompt.endswith("{\n")
    long = Function("x\n" * 4_000, "", "\n}\n", "")
    assert long.prompt.startswith("x\n") and len(long.prompt) <= 1_200
