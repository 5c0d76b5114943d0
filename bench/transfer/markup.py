"""Text out of HTML pages and out of SQL scripts."""

import re
from collections.abc import Iterator
from html.parser import HTMLParser

BLOCKS = frozenset(
    "blockquote br caption dd div dl dt h1 h2 h3 h4 h5 h6 hr li ol p section"
    " table td th tr ul".split()
)
"""Elements that a paragraph never goes across."""
VOID = frozenset("area base br col embed hr img input link meta source track wbr".split())
"""Elements without an end tag."""
NO_TEXT = frozenset({"head", "noscript", "pre", "script", "style"})
"""Elements whose content is no prose."""


def paragraphs(html: str, skip: frozenset[str] = frozenset()) -> list[str]:
    """The prose of a page: its paragraphs, headings, list items and cells, in order.

    White space is one space; a superscript follows `^`. Listings (`pre`) are left out.

    Args:
        html: The page.
        skip: Elements to leave out with all that they contain, beside those without prose: tags
            ("footer"), classes (".toc"), identifiers ("#banner").
    """
    reader = _Reader(skip | NO_TEXT)
    reader.feed(html)
    reader.close()
    reader.end_paragraph()
    return reader.found


class _Reader(HTMLParser):
    def __init__(self, skip: frozenset[str]) -> None:
        super().__init__(convert_charrefs=True)
        self.found: list[str] = []
        self._skip = skip
        self._open: list[tuple[str, bool]] = []
        self._pieces: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        skipped = self._is_skipped() or self._names(tag, attrs).intersection(self._skip)
        if not skipped and tag in BLOCKS:
            self.end_paragraph()
        if not skipped and tag == "sup":
            self._pieces.append("^")
        if tag not in VOID:
            self._open.append((tag, bool(skipped)))

    def handle_endtag(self, tag: str) -> None:
        if tag not in (name for name, _ in self._open):
            return
        if not self._is_skipped() and tag in BLOCKS:
            self.end_paragraph()
        # An element that was never closed ends with the one around it.
        while self._open.pop()[0] != tag:
            pass

    def handle_data(self, data: str) -> None:
        if not self._is_skipped():
            self._pieces.append(data)

    def end_paragraph(self) -> None:
        text = " ".join("".join(self._pieces).split())
        self._pieces.clear()
        if text:
            self.found.append(text)

    def _is_skipped(self) -> bool:
        return bool(self._open) and self._open[-1][1]

    def _names(self, tag: str, attrs: list[tuple[str, str | None]]) -> set[str]:
        values = {name: value or "" for name, value in attrs}
        classes = (f".{name}" for name in values.get("class", "").split())
        return {tag, f"#{values.get('id', '')}", *classes}


_TERM = re.compile(
    r"INSERT INTO ref\.icpc_thesaurus \(synonym, fk_code\) VALUES \(\s*'((?:[^']|'')*)',"
    r".*?\bcode = '(\w+)'",
    re.DOTALL,
)


def thesaurus_terms(sql: str) -> Iterator[tuple[str, str]]:
    """Rubric and term of every entry of GNUmed's ICPC-2 thesaurus script, in its order."""
    for match in _TERM.finditer(sql):
        term = " ".join(match[1].replace("''", "'").split())
        if term:
            yield match[2], term
