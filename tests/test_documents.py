"""Text is read as it stands, and bad text is named with its place."""

import json
import re
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from trimtab.errors import InputError
from trimtab.text.corpus import load_documents, save_documents
from trimtab.text.documents import read_documents
from trimtab.types import Document


@pytest.fixture(autouse=True)
def in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def put(path: str, data: str | bytes) -> str:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_bytes(data.encode() if isinstance(data, str) else data)
    return path


def put_lines(path: str, *records: object) -> str:
    return put(path, "".join(json.dumps(record) + "\n" for record in records))


def render(messages: list[dict]) -> tuple[str, list[tuple[int, int]]]:
    text, spans = "", []
    for message in messages:
        start = len(text) + len(message["role"]) + 1
        text += f"{message['role']}:{message['content']}\n"
        if message["role"] == "assistant":
            spans.append((start, len(text)))
    return text, spans


def learned(document: Document) -> list[str]:
    return [document.text[start:end] for start, end in document.loss_spans]


def test_a_file_is_one_document_as_it_stands() -> None:
    text = "größer\r\n\tπ 😀\n\n"
    put("a/b.txt", b"\xef\xbb\xbf" + text.encode())
    assert read_documents(["a/b.txt"]) == [Document("a/b.txt", text)]
    assert read_documents(["./a/../a/b.txt"])[0].text == text


def test_a_folder_is_read_without_hidden_binary_and_empty_files() -> None:
    for path in ("d/z.txt", "d/sub/b.py", "d/sub/a.py", "d/.hidden", "d/.git/config"):
        put(path, path)
    put("d/picture", b"\x89PNG\0\0\xff")
    put("d/empty", "")
    put("d/blank", " \n")
    Path("d/broken_link").symlink_to("nowhere")
    Path("d/loop").symlink_to(".")
    assert [document.name for document in read_documents(["d"])] == [
        "d/sub/a.py",
        "d/sub/b.py",
        "d/z.txt",
    ]


def test_globs_match_at_any_depth_and_files_are_read_once() -> None:
    for path in ("d/x.zig", "d/e/y.zig", "d/e/f/z.zig", "d/e/no.txt"):
        put(path, path)
    deep = [document.name for document in read_documents(["d/**/*.zig"])]
    assert deep == ["d/e/f/z.zig", "d/e/y.zig", "d/x.zig"]
    both = [document.name for document in read_documents(["d/x.zig", "./d", "d/**/*.zig"])]
    assert both == ["d/x.zig", "d/e/f/z.zig", "d/e/no.txt", "d/e/y.zig"]


def test_a_file_whose_name_looks_like_a_glob_is_a_file() -> None:
    put("a[1].txt", "one")
    assert read_documents(["a[1].txt"])[0].text == "one"


def test_a_name_that_is_not_utf8_can_still_be_saved() -> None:
    put("d/ok.txt", "x")
    try:
        Path("d/caf\udce9.txt").write_text("y")
    except OSError:
        pytest.skip("this disk keeps names in UTF-8")
    documents = read_documents(["d"])
    save_documents(Path("saved.jsonl"), documents)
    assert load_documents(Path("saved.jsonl")) == documents


def test_jsonl_records_of_each_shape() -> None:
    path = put_lines(
        "a.jsonl",
        {"text": "plain", "id": 7},
        {"prompt": "2+2=", "completion": "4"},
        {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]},
    )
    put(path, Path(path).read_text().replace("\n", "\r\n\n", 1))
    plain, completion, chat = read_documents([path], render_chat=render)
    assert plain == Document("a.jsonl:1", "plain")
    assert completion.name == "a.jsonl:3"
    assert completion.text == "2+2=4"
    assert learned(completion) == ["4"]
    assert chat.text == "user:hi\nassistant:yo\n"
    assert learned(chat) == ["yo\n"]


def test_jsonl_lines_end_at_line_feeds_only() -> None:
    put("a.jsonl", json.dumps({"text": "a\u2028b\x85c"}, ensure_ascii=False))
    assert read_documents(["a.jsonl"])[0].text == "a\u2028b\x85c"


def test_parquet_agrees_with_jsonl() -> None:
    records = [
        {"text": "plain"},
        {"prompt": "2+2=", "completion": "4"},
        {"messages": [{"role": "assistant", "content": "yo"}]},
        {"messages": [{"role": "assistant", "content": "x", "name": "n"}]},
    ]
    put_lines("a.jsonl", *records)
    columns = ("text", "prompt", "completion", "messages")
    table = {name: [record.get(name) for record in records] for name in columns}
    pyarrow.parquet.write_table(pyarrow.table({**table, "id": [1, 2, 3, 4]}), "a.parquet")
    from_jsonl = read_documents(["a.jsonl"], render_chat=render)
    from_parquet = read_documents(["a.parquet"], render_chat=render)
    assert [d.name for d in from_parquet] == [f"a.parquet:{i}" for i in (1, 2, 3, 4)]
    assert [(d.text, d.loss_spans) for d in from_parquet] == [
        (d.text, d.loss_spans) for d in from_jsonl
    ]


def test_parquet_rows_are_counted_over_row_groups() -> None:
    table = pyarrow.table({"text": [str(i) for i in range(10)]})
    pyarrow.parquet.write_table(table, "a.parquet", row_group_size=3)
    assert [d.name for d in read_documents(["a.parquet"])][-1] == "a.parquet:10"


GOOD = '{"text": "fine"}\n'


@pytest.mark.parametrize(
    ("name", "data", "words"),
    [
        ("a.txt", "", ["a.txt", "empty"]),
        ("a.txt", " \n", ["a.txt", "empty"]),
        ("a.jsonl", "\n\n", ["a.jsonl", "empty"]),
        ("a.jsonl", '{"text": ""}\n', ["a.jsonl", "empty"]),
        ("a.txt", b"abc\xe9def", ["a.txt", "UTF-8", "byte 3", "0xe9"]),
        ("a.txt", b"ab\0c", ["a.txt", "binary", "byte 2"]),
        ("a.jsonl", GOOD.encode() + b'{"text": "\xff"}', ["line 2 of a.jsonl", "UTF-8"]),
        ("a.jsonl", GOOD + '{"text": ', ["line 2 of a.jsonl", "JSON"]),
        ("a.jsonl", GOOD + "[" * 100_000, ["line 2 of a.jsonl", "JSON"]),
        ("a.jsonl", GOOD + "[1]", ["line 2 of a.jsonl", "list"]),
        ("a.jsonl", GOOD + "{}", ["line 2 of a.jsonl", "no field"]),
        ("a.jsonl", GOOD + '{"content": "x"}', ["line 2 of a.jsonl", "has content", "messages"]),
        ("a.jsonl", '{"text": 3}', ["line 1 of a.jsonl", "text", "int"]),
        ("a.jsonl", '{"text": null}', ["line 1 of a.jsonl", "NoneType"]),
        ("a.jsonl", '{"text": "\\ud800"}', ["line 1 of a.jsonl", "surrogate"]),
        ("a.jsonl", '{"prompt": "x"}', ["line 1 of a.jsonl", "lacks completion"]),
        ("a.jsonl", '{"prompt": "x", "completion": ""}', ["line 1", "empty completion"]),
        ("a.jsonl", '{"text": "x", "messages": []}', ["line 1 of a.jsonl", "exactly one"]),
        ("a.jsonl", '{"messages": []}', ["line 1 of a.jsonl", "at least one"]),
        ("a.jsonl", '{"messages": ["x"]}', ["line 1 of a.jsonl", "str"]),
        ("a.jsonl", '{"messages": [{"role": "user"}]}', ["line 1", "messages.content"]),
        ("a.jsonl", '{"messages": [{"role": "user", "content": "x"}]}', ["line 1", "no assistant"]),
        ("a.parquet", b"PAR1 not really", ["a.parquet", "Parquet"]),
    ],
)
def test_bad_input_names_its_place(name: str, data: str | bytes, words: list[str]) -> None:
    put(name, data)
    with pytest.raises(InputError) as caught:
        read_documents([name], render_chat=render)
    assert all(word in caught.value.message for word in words), caught.value.message
    assert caught.value.hint


def test_parquet_without_known_columns_lists_those_it_has() -> None:
    pyarrow.parquet.write_table(pyarrow.table({"body": ["x"], "id": [1]}), "a.parquet")
    with pytest.raises(InputError, match=r"a\.parquet has the columns body, id"):
        read_documents(["a.parquet"])


def test_parquet_of_a_wrong_type_names_the_row() -> None:
    pyarrow.parquet.write_table(pyarrow.table({"text": [1]}), "a.parquet")
    with pytest.raises(InputError, match=r"row 1 of a\.parquet.*int"):
        read_documents(["a.parquet"])


def test_chat_without_a_template_is_refused() -> None:
    put_lines("a.jsonl", {"messages": [{"role": "assistant", "content": "x"}]})
    with pytest.raises(InputError, match=r"line 1 of a\.jsonl.*chat template"):
        read_documents(["a.jsonl"])


def test_a_template_that_refuses_is_said_with_the_line() -> None:
    def refuse(messages: list[dict]) -> tuple[str, list[tuple[int, int]]]:
        raise InputError("roles must alternate", hint="mend the order")

    put_lines("a.jsonl", {"messages": [{"role": "assistant", "content": "x"}]})
    with pytest.raises(InputError, match=r"line 1 of a\.jsonl: roles must alternate"):
        read_documents(["a.jsonl"], render_chat=refuse)


@pytest.mark.parametrize("pattern", ["nowhere.txt", "d/*.rs", ""])
def test_a_pattern_without_files_is_named(pattern: str) -> None:
    put("d/x.py", "x")
    with pytest.raises(InputError, match=re.escape(repr(pattern))):
        read_documents(["d", pattern])


def test_a_corpus_without_text_is_an_error() -> None:
    put("d/empty", "")
    for patterns in (["d"], ["d/*"], []):
        with pytest.raises(InputError, match="no text"):
            read_documents(patterns)


def test_a_pair_is_its_target_with_a_source() -> None:
    put_lines("p.jsonl", {"source": "a", "target": "b", "note": 1}, {"text": "c", "source": "web"})
    expected = [Document("p.jsonl:1", "b", source="a"), Document("p.jsonl:2", "c")]
    assert read_documents(["p.jsonl"]) == expected
    rows = [{"source": "a", "target": "b", "text": None}, {"text": "c", "source": "web"}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), "p.parquet")
    found = read_documents(["p.parquet"])
    assert [(d.text, d.source) for d in found] == [("b", "a"), ("c", None)]
    # What a small model is tuned on has no source.
    save_documents(Path("saved.jsonl"), expected)
    assert load_documents(Path("saved.jsonl"))[0] == Document("p.jsonl:1", "b")


@pytest.mark.parametrize(
    ("record", "finding"),
    [
        ({"source": "a"}, "lacks target; expected source and target"),
        ({"target": "a"}, "lacks source; expected source and target"),
        ({"source": " ", "target": "b"}, "has an empty source"),
        ({"source": "a", "target": ""}, "has an empty target"),
        ({"source": "a", "target": 3}, "has a target of type int"),
    ],
)
def test_a_broken_pair_is_named(record: dict, finding: str) -> None:
    put_lines("p.jsonl", record)
    with pytest.raises(InputError, match=finding):
        read_documents(["p.jsonl"])
