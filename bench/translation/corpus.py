"""Parallel sentences out of manuals in two languages: the same pages, paragraph by paragraph."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.transfer.debian import Package, fetch_package, version_of
from bench.transfer.markup import paragraphs
from bench.transfer.sources import HANDBOOK_SKIP
from trimtab.store.files import write_atomic

HANDBOOK = Package(
    "debian-handbook",
    r"/html/(fr-FR|en-US)/[^/]+\.html$",
    "11.20220922",
    "GPL-2.0-or-later or CC-BY-SA-3.0",
    35,
)
GIMP = tuple(
    Package(f"gimp-help-{language}", r"/help/../[^/]+\.html$", "2.10.34-2", "GFDL-1.2", 52)
    for language in ("en", "fr")
)
LIBREOFFICE = Package(
    "libreoffice-help-fr", r"/text/swriter/guide/[^/]+\.html$", "4:7.4.7-1", "MPL-2.0", 3
)
GIMP_SKIP = frozenset({".toc", ".navheader", ".navfooter"})

MIN_CHARACTERS, MAX_CHARACTERS = 40, 240
"""Of a source sentence, and at most half as much again of its target."""

_FRENCH = frozenset(
    "au aux ce cette dans de des du elle en est et il la le les ou par pas pour que qui se son"
    " sur un une vous".split()
)
_ENGLISH = frozenset("a an and are be by for from in is it of on or that the this to with".split())
_END = re.compile(r"(?<=[.!?…])\s+(?=[A-ZÀ-ÝŒ«“])")


@dataclass(frozen=True)
class Pair:
    """A sentence and its translation.

    Attributes:
        chapter: Where it stands; chapters are never divided between training and test.
        source: English.
        target: French.
    """

    chapter: str
    source: str
    target: str


@dataclass(frozen=True)
class Manual:
    """A manual in two languages.

    Attributes:
        pairs: Sentences that both languages have, in order.
        texts: French paragraphs by chapter, those without an equal number of sentences too.
        versions: Of the packages.
    """

    pairs: tuple[Pair, ...]
    texts: Mapping[str, tuple[str, ...]]
    versions: Mapping[str, str]


def read_handbook(cache: Path) -> Manual:
    """The Debian administrator's handbook, by chapter."""
    folder = fetch_package(HANDBOOK, cache)
    english, french = (_pages(folder, language) for language in ("en-US", "fr-FR"))
    chapters = {name: _chapter(name, page) for name, page in english.items()}
    versions = {HANDBOOK.name: version_of(HANDBOOK, cache)}
    return _manual(english, french, chapters, HANDBOOK_SKIP, versions)


def read_gimp(cache: Path) -> Manual:
    """GIMP's manual; each page is a chapter."""
    english, french = (_pages(fetch_package(package, cache), package.name[-2:]) for package in GIMP)
    versions = {package.name: version_of(package, cache) for package in GIMP}
    return _manual(english, french, {name: name for name in english}, GIMP_SKIP, versions)


def _pages(folder: Path, language: str) -> dict[str, str]:
    return {
        path.name: path.read_text(encoding="utf-8", errors="replace")
        for path in sorted(folder.rglob("*.html"))
        if path.parent.name == language
    }


def _chapter(name: str, page: str) -> str:
    above = re.search(r'<link rel="up" href="([^"]+)\.html"', page)
    stem = name.removesuffix(".html")
    return stem if above is None or above[1] == "index" else above[1]


def _manual(
    english: Mapping[str, str],
    french: Mapping[str, str],
    chapters: Mapping[str, str],
    skip: frozenset[str],
    versions: Mapping[str, str],
) -> Manual:
    pairs: list[Pair] = []
    texts: dict[str, list[str]] = {}
    for name in sorted(english.keys() & french.keys()):
        sides = [paragraphs(pages[name], skip) for pages in (english, french)]
        # Both come from one source, so that a page has as many paragraphs in either language.
        if len(sides[0]) != len(sides[1]):
            continue
        for source, target in zip(*sides, strict=True):
            if not is_french(target) or source == target:
                continue
            texts.setdefault(chapters[name], []).append(target)
            pairs += (Pair(chapters[name], s, t) for s, t in sentence_pairs(source, target))
    seen: set[str] = set()
    once = [p for p in pairs if not (p.source in seen or seen.add(p.source))]
    return Manual(tuple(once), {name: tuple(found) for name, found in texts.items()}, versions)


def is_french(paragraph: str) -> bool:
    """Whether French function words outnumber English ones."""
    words = re.findall(r"\w+", paragraph.lower())
    return sum(w in _FRENCH for w in words) > sum(w in _ENGLISH for w in words)


def sentence_pairs(source: str, target: str) -> Iterator[tuple[str, str]]:
    """Sentences of a paragraph that has as many in either language, without odd lengths."""
    sides = [_END.split(" ".join(text.split())) for text in (source, target)]
    if len(sides[0]) != len(sides[1]):
        return
    for one, other in zip(*sides, strict=True):
        ends = one[-1] in ".!?:" and other[-1] in ".!?:"
        long_enough = MIN_CHARACTERS <= len(one) <= MAX_CHARACTERS
        if ends and long_enough and 0.6 * len(one) <= len(other) <= 1.9 * len(one):
            yield one, other


def write_pairs(path: Path, pairs: Sequence[Pair]) -> None:
    """Write pairs as JSON lines with source and target.

    Raises:
        StorageError: The disk is full or the path cannot be written.
    """
    lines = (
        json.dumps({"source": pair.source, "target": pair.target}, ensure_ascii=False) + "\n"
        for pair in pairs
    )
    write_atomic(path, "".join(lines).encode())


def read_general(cache: Path) -> list[str]:
    """French text of another kind, by page: the guide of LibreOffice's writer."""
    folder = fetch_package(LIBREOFFICE, cache)
    texts = []
    for path in sorted(folder.rglob("*.html")):
        found = paragraphs(path.read_text(encoding="utf-8", errors="replace"))
        kept = [text for text in found if len(text) >= MIN_CHARACTERS and is_french(text)]
        if kept:
            texts.append("\n\n".join(kept) + "\n")
    return texts


def write_texts(path: Path, texts: Sequence[str]) -> None:
    """Write texts as JSON lines.

    Raises:
        StorageError: The disk is full or the path cannot be written.
    """
    lines = (json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts)
    write_atomic(path, "".join(lines).encode())
