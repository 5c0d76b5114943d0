"""Read a user's text: files, folders, globs, JSON lines, Parquet."""

import glob
import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from trimtab.errors import InputError
from trimtab.types import Document

Spans = tuple[tuple[int, int], ...]
"""Character ranges [start, end)."""

RenderChat = Callable[[list[dict[str, Any]]], tuple[str, Sequence[tuple[int, int]]]]
"""Applies a tokenizer's chat template: the text, and the spans of the assistant's turns."""

_SHAPES = (("text",), ("prompt", "completion"), ("messages",))
_PAIR = ("source", "target")
_FIELDS = tuple(field for shape in (*_SHAPES, _PAIR) for field in shape)
_EXPECTED = "text, or prompt and completion, or messages, or source and target"
_SNIFFED_BYTES = 8192


def read_documents(
    patterns: Sequence[str], *, render_chat: RenderChat | None = None
) -> list[Document]:
    """Read a corpus: text files, folders, globs, .jsonl and .parquet files.

    A text file is one document. A record of a .jsonl or .parquet file is one document, with
    `text`, or `prompt` and `completion` (the loss counts the completion), or `messages` (the
    loss counts the assistant's turns), or `source` and `target` (the text is the target; only an
    encoder-decoder reads the source); its other fields are passed over. Folders are read with
    their subfolders, without hidden and binary files. Empty files of a folder or glob, blank
    lines and empty texts are passed over. Names are the paths as given, with `:LINE` or `:ROW`
    for records; a file that several patterns match is read once. The order is that of the
    patterns, then of the paths.

    Args:
        patterns: Files, folders, or globs (`**` matches any depth).
        render_chat: Renders `messages`; templates belong to a tokenizer, so the caller gives it.

    Raises:
        InputError: A pattern matches nothing, there is no text, or a file is empty, unreadable,
            not UTF-8, or holds a broken record; it names the file and the line.
    """
    documents: list[Document] = []
    seen: set[str] = set()
    for pattern in patterns:
        for path, named in _files(pattern):
            real = os.path.realpath(path)
            if real in seen:
                continue
            seen.add(real)
            found = _read_file(path, render_chat)
            if named and not found:
                raise InputError(f"{shown_name(path)} is empty", hint="give a file that holds text")
            documents.extend(found)
    if not documents:
        raise InputError(
            f"no text in {', '.join(map(repr, patterns)) or 'an empty list of files'}",
            hint="give files that hold text: source or text files, .jsonl or .parquet",
        )
    return documents


def read_by_kind(named: Sequence[str]) -> dict[str, list[Document]]:
    """Read several kinds of text.

    Args:
        named: Each `KIND=PATTERN`, or a pattern, whose kind is then its name without the suffix.

    Raises:
        InputError: As `read_documents`.
    """
    found: dict[str, list[Document]] = {}
    for each in named:
        kind, _, pattern = each.rpartition("=")
        found.setdefault(kind or Path(pattern).stem, []).extend(read_documents([pattern]))
    return found


def _files(pattern: str) -> list[tuple[Path, bool]]:
    """Paths that a pattern matches, and whether it names the file itself."""
    if os.path.isdir(pattern):
        return [(path, False) for path in _walk(pattern)]
    if os.path.exists(pattern):
        return [(Path(pattern), True)]
    paths = sorted(path for path in glob.glob(pattern, recursive=True) if os.path.isfile(path))
    if not paths:
        raise InputError(
            f"no file matches {pattern!r}",
            hint="check the spelling and the folder; quote a glob so that the shell keeps it",
        )
    return [(Path(path), False) for path in paths]


def _walk(folder: str) -> list[Path]:
    found: list[Path] = []
    for parent, folders, names in os.walk(folder, onerror=_refuse_unreadable):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [Path(parent, name) for name in names if not name.startswith(".")]
    return sorted(path for path in found if path.is_file() and not _is_binary(path))


def _refuse_unreadable(error: OSError) -> None:
    raise InputError(
        f"cannot read {error.filename}: {error.strerror}",
        hint="change its permissions, or name the files to read",
    ) from error


def _is_binary(path: Path) -> bool:
    if path.suffix.lower() == ".parquet":
        return False
    try:
        with open(path, "rb") as file:
            return b"\0" in file.read(_SNIFFED_BYTES)
    except OSError as error:
        _refuse_unreadable(error)
        raise


def _read_file(path: Path, render_chat: RenderChat | None) -> list[Document]:
    suffix = path.suffix.lower()
    if suffix not in (".jsonl", ".parquet"):
        text = _decoded(_bytes(path), shown_name(path))
        return [Document(shown_name(path), text)] if text.strip() else []
    records = json_lines(path) if suffix == ".jsonl" else _parquet(path)
    word = "line" if suffix == ".jsonl" else "row"
    read = (
        _document(
            record,
            f"{shown_name(path)}:{number}",
            f"{word} {number} of {shown_name(path)}",
            render_chat,
        )
        for number, record in records
    )
    return [document for document in read if document is not None]


def shown_name(path: Path) -> str:
    """A path as given, with forward slashes, in characters that any file can hold."""
    # A name of a file may be bytes that are not UTF-8, which no JSON could hold.
    return os.fsencode(path.as_posix()).decode("utf-8", "backslashreplace")


def _bytes(path: Path) -> bytes:
    try:
        data = path.read_bytes()
    except FileNotFoundError as error:
        raise InputError(
            f"there is no file {shown_name(path)}", hint="check the path, or name another file"
        ) from error
    except OSError as error:
        _refuse_unreadable(error)
        raise
    if b"\0" in data[:_SNIFFED_BYTES]:
        raise InputError(
            f"{shown_name(path)} is binary (byte {data.index(0)} is zero), expected UTF-8 text",
            hint="convert it to UTF-8, or name text files only, for example 'folder/**/*.txt'",
        )
    return data.removeprefix(b"\xef\xbb\xbf")


def _decoded(data: bytes, where: str) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise InputError(
            f"{where} is not UTF-8: byte {error.start} is 0x{data[error.start]:02x}",
            hint="convert it, for example: iconv -f latin1 -t utf-8 FILE > NEW",
        ) from error


def json_lines(path: Path) -> Iterator[tuple[int, Any]]:
    """Values of a file of JSON lines with their line numbers, from 1; blank lines are passed over.

    Raises:
        InputError: The file cannot be read, or a line is not UTF-8 or not JSON.
    """
    for number, line in enumerate(_bytes(path).split(b"\n"), 1):
        where = f"line {number} of {shown_name(path)}"
        text = _decoded(line, where)
        if not text.strip():
            continue
        try:
            yield number, json.loads(text)
        except (ValueError, RecursionError) as error:
            # Its own words would count lines in that line.
            is_json = isinstance(error, json.JSONDecodeError)
            fault = (
                f"{error.msg.removesuffix(' at')} at column {error.colno}"
                if is_json
                else str(error)
            )
            raise InputError(
                f"{where} is not valid JSON: {fault}",
                hint="mend or remove that line; each line is one JSON object",
            ) from error


def _parquet(path: Path) -> Iterator[tuple[int, Any]]:
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            columns = [name for name in file.schema_arrow.names if name in _FIELDS]
            if not columns:
                names = ", ".join(file.schema_arrow.names)
                raise _broken(shown_name(path), f"has the columns {names}; expected {_EXPECTED}")
            number = 0
            for batch in file.iter_batches(columns=columns):
                for record in batch.to_pylist():
                    number += 1
                    yield number, _without_nulls(record)
    except (OSError, pyarrow.ArrowException) as error:
        raise InputError(
            f"{shown_name(path)} cannot be read as Parquet: {error}",
            hint="the file was cut off or is of another format; make it again",
        ) from error


def _without_nulls(value: Any) -> Any:
    """A row without the fields that only other rows fill: columns are common to all rows."""
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def _document(
    record: Any, name: str, where: str, render_chat: RenderChat | None
) -> Document | None:
    if not isinstance(record, dict):
        raise _broken(where, f"is a JSON {type(record).__name__}, expected an object")
    shapes = [shape for shape in _SHAPES if any(field in record for field in shape)]
    if not shapes and any(field in record for field in _PAIR):
        # Beside a text, a field "source" says where it is from.
        shapes = [_PAIR]
    if len(shapes) != 1:
        found = ", ".join(sorted(map(str, record))) or "no field"
        raise _broken(where, f"has {found}; expected exactly one of {_EXPECTED}")
    missing = [field for field in shapes[0] if field not in record]
    if missing:
        raise _broken(where, f"lacks {missing[0]}; expected {' and '.join(shapes[0])}")
    if shapes[0] == ("messages",):
        text, spans = _rendered(record["messages"], where, render_chat)
        return Document(name, text, spans, markup=True)
    parts = [_string(record[field], field, where) for field in shapes[0]]
    if len(parts) == 1:
        return Document(name, parts[0]) if parts[0].strip() else None
    if shapes[0] == _PAIR:
        empty = next((f for f, part in zip(_PAIR, parts, strict=True) if not part.strip()), None)
        if empty:
            raise _broken(where, f"has an empty {empty}")
        return Document(name, parts[1], source=parts[0])
    if not parts[1]:
        raise _broken(where, "has an empty completion: there is nothing to learn")
    return Document(name, "".join(parts), ((len(parts[0]), len(parts[0]) + len(parts[1])),))


def _rendered(messages: Any, where: str, render_chat: RenderChat | None) -> tuple[str, Spans]:
    if not isinstance(messages, list) or not messages:
        raise _broken(where, "has messages that are not a list of at least one message")
    for message in messages:
        if not isinstance(message, dict):
            raise _broken(where, f"has a message that is a {type(message).__name__}")
        for field in ("role", "content"):
            _string(message.get(field), f"messages.{field}", where)
    if render_chat is None:
        raise InputError(
            f"{where} has messages, and no chat template is at hand to render them",
            hint="use a model whose tokenizer has a chat template, or give prompt and completion",
        )
    try:
        text, spans = render_chat(messages)
    except InputError as error:
        raise InputError(f"{where}: {error.message}", hint=error.hint) from error
    if not spans:
        raise _broken(where, "has no assistant turn with text: there is nothing to learn")
    return text, tuple((start, end) for start, end in spans)


def _string(value: Any, field: str, where: str) -> str:
    if not isinstance(value, str):
        raise _broken(where, f"has a {field} of type {type(value).__name__}, expected a string")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise _broken(
            where, f"has half a surrogate pair at character {error.start} of {field}"
        ) from error
    return value


def _broken(where: str, finding: str) -> InputError:
    return InputError(
        f"{where} {finding}", hint=f"mend or remove that record; a record has {_EXPECTED}"
    )
