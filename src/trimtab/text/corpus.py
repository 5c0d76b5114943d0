"""The user's text as a corpus: split, fingerprinted, kept, and cut into windows."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from trimtab.errors import InputError
from trimtab.store.files import write_atomic
from trimtab.text.documents import RenderChat as RenderChat
from trimtab.text.documents import json_lines, shown_name
from trimtab.text.documents import read_documents as read_documents
from trimtab.text.duplicates import Deduplicated as Deduplicated
from trimtab.text.duplicates import Dropped as Dropped
from trimtab.text.duplicates import drop_near_duplicates as drop_near_duplicates
from trimtab.types import Document

_SAVED_KEYS = {"name", "text", "loss_spans"}


class Window(NamedTuple):
    """A stretch of a document that a model runs over.

    Attributes:
        start: First token of the window.
        end: One past its last token.
        score_from: First token that this window scores; those before it are context.
    """

    start: int
    end: int
    score_from: int


def split_held_out(
    documents: Sequence[Document], share: float, seed: int
) -> tuple[list[Document], list[Document]]:
    """Split a corpus by document into training and held-out text.

    Which documents are held out follows from their texts and the seed: neither from their order,
    nor from names, which differ from machine to machine. With a share above 0 both sides get at
    least one document; a single document is cut in two at the line break nearest to the share, as
    NAME#train and NAME#held-out.

    Args:
        documents: The corpus; both sides keep its order.
        share: Share of documents to hold out, in [0, 1).
        seed: Chooses another split.

    Raises:
        InputError: The only document is too short to be cut.
        ValueError: The share is out of range.
    """
    if not 0 <= share < 1:
        raise ValueError(f"share {share} is not in [0, 1)")
    if share == 0 or not documents:
        return list(documents), []
    if len(documents) == 1:
        return _cut(documents[0], share)
    count = min(max(round(share * len(documents)), 1), len(documents) - 1)
    drawn = [_draw(document.text, seed) for document in documents]
    ranked = sorted(range(len(documents)), key=drawn.__getitem__)
    sides = [ranked[count:], ranked[:count]]
    train, held_out = ([documents[number] for number in sorted(side)] for side in sides)
    return train, held_out


def _draw(text: str, seed: int) -> bytes:
    return hashlib.sha256(f"{seed} {text}".encode("utf-8", "surrogatepass")).digest()


def _cut(document: Document, share: float) -> tuple[list[Document], list[Document]]:
    text, spans = document.text, document.loss_spans
    # No spans means that all counts, so each side must keep a part of a span.
    first = (spans[0][0] if spans else 0) + 1
    last = (spans[-1][1] if spans else len(text)) - 1
    if first > last:
        raise InputError(
            f"{document.name} is the only document and too short to hold out a part of it",
            hint="give more text, or hold out nothing",
        )
    target = round((1 - share) * len(text))
    breaks = [text.rfind("\n", first - 1, target) + 1, text.find("\n", target, last) + 1]
    usable = [at for at in breaks if first <= at <= last] or [min(max(target, first), last)]
    at = min(usable, key=lambda position: abs(position - target))
    return [_part(document, 0, at, "train")], [_part(document, at, len(text), "held-out")]


def _part(document: Document, start: int, end: int, side: str) -> Document:
    clipped = ((max(a, start) - start, min(b, end) - start) for a, b in document.loss_spans)
    return Document(
        f"{document.name}#{side}",
        document.text[start:end],
        tuple((a, b) for a, b in clipped if a < b),
        markup=document.markup,
    )


def sha256_of_documents(documents: Sequence[Document]) -> str:
    """Fingerprint of names, texts, loss spans and markup, in their order; not of sources."""
    digest = hashlib.sha256()
    for document in documents:
        line = _line(document)
        digest.update(len(line).to_bytes(8, "big") + line)
    return digest.hexdigest()


def save_documents(path: Path, documents: Sequence[Document]) -> None:
    """Write documents as JSON lines with name, text, loss_spans and, if true, markup, atomically.

    A source is left out: what is saved is what small models read.

    Raises:
        StorageError: The disk is full or the path cannot be written.
    """
    write_atomic(path, b"".join(_line(document) + b"\n" for document in documents))


def _line(document: Document) -> bytes:
    value: dict[str, object] = {
        "loss_spans": document.loss_spans,
        "name": document.name,
        "text": document.text,
    }
    if document.markup:
        value["markup"] = True
    return json.dumps(value, ensure_ascii=False).encode()


def load_documents(path: Path) -> list[Document]:
    """Read what `save_documents` wrote.

    Raises:
        InputError: The file cannot be read or is not of that form; it names the line.
    """
    return [
        _loaded(value, f"line {number} of {shown_name(path)}") for number, value in json_lines(path)
    ]


def _loaded(value: Any, where: str) -> Document:
    if not isinstance(value, Mapping) or set(value) - {"markup"} != _SAVED_KEYS:
        raise _changed(where, f"expected exactly the keys {', '.join(sorted(_SAVED_KEYS))}")
    name, text, spans = value["name"], value["text"], value["loss_spans"]
    if not isinstance(name, str) or not isinstance(text, str) or not isinstance(spans, list):
        raise _changed(where, "expected a name, a text and a list of spans")
    if not isinstance(value.get("markup", False), bool):
        raise _changed(where, "expected markup to be true or false")
    for span in spans:
        whole = isinstance(span, list) and [type(edge) for edge in span] == [int, int]
        if not whole or not 0 <= span[0] < span[1] <= len(text):
            raise _changed(where, f"{span} is no range of characters of the text")
    edges = tuple((start, end) for start, end in spans)
    return Document(name, text, edges, markup=value.get("markup", False))


def _changed(where: str, finding: str) -> InputError:
    return InputError(
        f"{where} is not a saved document: {finding}",
        hint="the file was changed; make it again from the original text",
    )


def scored_windows(
    n_tokens: int, window_tokens: int, stride_tokens: int, *, first: int = 1
) -> list[Window]:
    """Cut a document into overlapping windows that score every token from `first` on once.

    A scored token has at least window_tokens - stride_tokens tokens of context, and at least
    one, except at the document's start, where it has all there are.

    Args:
        n_tokens: Length of the document.
        window_tokens: Longest window, at least 2.
        stride_tokens: New tokens in each window after the first, in [1, window_tokens].
        first: First token that is scored: 0 where something stands before the document.

    Raises:
        ValueError: A length is out of range.
    """
    if window_tokens < 2 or not 1 <= stride_tokens <= window_tokens:
        raise ValueError(f"windows of {window_tokens} tokens with stride {stride_tokens}")
    stride_tokens = min(stride_tokens, window_tokens - 1)
    windows: list[Window] = []
    start, score_from = 0, first
    while score_from < n_tokens:
        end = min(start + window_tokens, n_tokens)
        windows.append(Window(start, end, score_from))
        start, score_from = start + stride_tokens, end
    return windows
