"""Where each domain's texts come from, and how they are read."""

import gzip
import platform
import random
import re
import textwrap
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.transfer.debian import Package, fetch_package, sha256_of_texts, version_of
from bench.transfer.markup import paragraphs, thesaurus_terms
from bench.transfer.splits import Budget, Text, parts, size
from examples.demo import corpus

ZIG_SIZES = (2_500, 16_000, 64_000)
"""Bytes of the smallest file, of the largest, and of the largest that may fill up training."""

HANDBOOK = Package(
    "debian-handbook",
    r"/html/(de-DE|en-US|ja-JP|ru-RU)/[^/]+\.html$",
    "11.20220922",
    "GPL-2.0-or-later or CC-BY-SA-3.0",
    35,
)
HANDBOOK_SKIP = frozenset(
    {"#banner", "#title", ".docnav", ".example", ".figure", ".table", ".toc", ".url"}
)
ENGLISH = frozenset(
    "a and are be by can for from have if is it not of on or that the this to which with"
    " you".split()
)
GERMAN = frozenset(
    "auch auf das dem den der des die ein eine es für im ist kann mit nicht oder sich sie und von"
    " werden wird zu".split()
)
"""Function words of two languages, none of which is one in the other."""
CYRILLIC = ("CYRILLIC",)
JAPANESE = ("HIRAGANA", "KATAKANA", "CJK")
"""How the names of a script's letters begin in Unicode."""

GNUMED = Package(
    "gnumed-server",
    r"/v15-ref-icpc2_de-thesaurus\.sql$",
    "22.19-1",
    "GPL-2.0-or-later, as the package states; rights in the classification not checked",
    13,
)

BASE_FILES = Package(
    "base-files",
    r"/common-licenses/(Artistic|GFDL-1\.[23]|GPL-1|LGPL-2|MPL-1\.1)$",
    "12.4+deb12u15",
    "each licence's own terms: copies of the text are allowed",
    1,
)
LICENSEE = Package(
    "ruby-licensee",
    r"/_licenses/[^/]+\.txt$",
    "9.15.2-4",
    "MIT; each licence's own terms: copies of the text are allowed",
    1,
)
DOC_DEBIAN = Package(
    "doc-debian",
    r"/doc/debian/(constitution|social-contract)\.txt\.gz$",
    "11.3+nmu1",
    "Open Publication License 1.0 or later",
    1,
)
FAMILIES = {
    "gnu": "agpl-3.0 gpl-2.0 gpl-3.0 lgpl-2.1 lgpl-3.0 GFDL-1.2 GFDL-1.3 GPL-1 LGPL-2",
    "permissive": "0bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear bsd-4-clause bsl-1.0 isc mit"
    " mit-0 ncsa postgresql unlicense upl-1.0 wtfpl zlib",
    "apache": "apache-2.0 ecl-2.0",
    "artistic": "artistic-2.0 Artistic",
    "creative-commons": "cc-by-4.0 cc-by-sa-4.0 cc0-1.0",
    "open-data": "odbl-1.0",
    "eclipse": "epl-1.0 epl-2.0",
    "european-union": "eupl-1.1 eupl-1.2",
    "mozilla": "mpl-2.0 MPL-1.1",
    "rosen": "afl-3.0 osl-3.0",
    "latex": "lppl-1.3c",
    "microsoft": "ms-pl ms-rl",
    "fonts": "ofl-1.1",
    "vim": "vim",
    "debian": "constitution social-contract",
}
"""Licences by family: texts of one family quote each other. CeCILL is French here and MulanPSL
Chinese; they are left out."""

LIBREOFFICE = Package(
    "libreoffice-help-de",
    r"/help/de/text/swriter/guide/[^/]+\.html$",
    "4:7.4.7-1+deb12u14",
    "MPL-2.0",
    4,
)
LIBREOFFICE_SKIP = frozenset({"header", "footer", "aside", ".relatedtopics", ".MAC"})
GENERAL_SEED = 0
SKIPPED_CHARS, PYTHON_CHARS = 12_000, 2_400
"""Of a Python module: licence, imports and tables before, and what is taken after."""


@dataclass(frozen=True)
class Source:
    """What a text was taken from.

    Attributes:
        package: Package and its kind.
        version: Its version.
        licence: Its terms.
        sha256: Fingerprint of the extracted texts, names and contents.
    """

    package: str
    version: str
    licence: str
    sha256: str


@dataclass(frozen=True)
class Corpus:
    """A domain's texts and where they come from."""

    texts: tuple[Text, ...]
    sources: tuple[Source, ...]


def _source(package: Package, texts: Iterable[Text], cache: Path) -> Source:
    found = sha256_of_texts({text.name: text.text for text in texts})
    version = version_of(package, cache)
    return Source(f"Debian {package.name}", version, package.licence, found)


def read_zig(cache: Path) -> Corpus:
    """Programs of Zig's standard library; tables are left out. A file is its own family."""
    folder = corpus.fetch_zig(cache)
    smallest, largest, spare = ZIG_SIZES
    texts = []
    for low, high in ((smallest, largest), (largest + 1, spare)):
        choice = corpus.Choice(min_bytes=low, max_bytes=high, test_files=0, train_bytes=1 << 40)
        for name, text in corpus.choose(folder, choice)["train"].items():
            texts.append(Text(name, name, text, spare=low > smallest))
    package, version = corpus.ZIG_PACKAGE.split("==")
    source = Source(f"PyPI {package}", version, corpus.ZIG_LICENCE, corpus.sha256_of_tree(folder))
    return Corpus(tuple(texts), (source,))


def read_handbook(language: str, is_left: Callable[[str], bool], cache: Path) -> Corpus:
    """Sections of an edition of the Debian administrator's handbook, by chapter.

    Args:
        language: Of the edition, as its folder is named.
        is_left: As for `handbook_sections`.
        cache: Where fetched text is kept.
    """
    folder = fetch_package(HANDBOOK, cache)
    pages, english = (
        {
            path.name: path.read_text(encoding="utf-8")
            for path in folder.rglob("*.html")
            if path.parent.name == name
        }
        for name in (language, "en-US")
    )
    texts = tuple(handbook_sections(pages, english, is_left))
    return Corpus(texts, (_source(HANDBOOK, texts, cache),))


def handbook_sections(
    pages: dict[str, str], english: dict[str, str], is_left: Callable[[str], bool]
) -> Iterator[Text]:
    """Texts of the pages, by chapter, without examples and without what was not translated.

    Not translated is a paragraph that an English page has too, or that reads as one: its
    cross-references are in the other language.

    Args:
        pages: HTML of the pages by file name.
        english: HTML of the English edition's pages.
        is_left: Whether a paragraph reads as English.
    """
    untranslated = {
        paragraph for page in english.values() for paragraph in paragraphs(page, HANDBOOK_SKIP)
    }
    for name, page in sorted(pages.items()):
        above = re.search(r'<link rel="up" href="([^"]+)\.html"', page)
        if above is None:
            continue
        stem = name.removesuffix(".html")
        chapter = stem if above[1] == "index" else above[1]
        kept = [
            paragraph
            for paragraph in paragraphs(page, HANDBOOK_SKIP)
            if paragraph not in untranslated and not is_left(paragraph)
        ]
        if kept:
            yield Text(f"{chapter}/{stem}.txt", chapter, "\n\n".join(kept) + "\n")


def is_english(paragraph: str) -> bool:
    """Whether a paragraph of German or English is rather English: by words of both."""
    words = re.findall(r"\w+", paragraph.lower())
    return sum(word in ENGLISH for word in words) > sum(word in GERMAN for word in words)


def is_outside(script: tuple[str, ...], paragraph: str) -> bool:
    """Whether at most half of a paragraph's letters are of a script (`CYRILLIC`, `JAPANESE`)."""
    letters = [unicodedata.name(sign, "") for sign in paragraph if sign.isalpha()]
    return 2 * sum(name.startswith(script) for name in letters) <= len(letters)


def read_medical(cache: Path) -> Corpus:
    """Terms of the German ICPC-2 thesaurus, one text a chapter."""
    folder = fetch_package(GNUMED, cache)
    (script,) = folder.rglob("*.sql")
    texts = tuple(medical_chapters(script.read_text(encoding="utf-8")))
    return Corpus(texts, (_source(GNUMED, texts, cache),))


def medical_chapters(sql: str) -> Iterator[Text]:
    """One text a chapter: a line for each term, a blank line between rubrics.

    A term that stands in several places, also with its words in another order, is kept in the
    first only, in order of the chapters and rubrics. The chapters of the female and of the male
    genital organs share many terms and are one family.
    """
    rubrics: dict[str, list[str]] = defaultdict(list)
    for rubric, term in thesaurus_terms(sql):
        rubrics[rubric].append(re.sub(r" *\[kodiere zusätzlich [^\]]*\]", "", term))
    seen: set[tuple[str, ...]] = set()
    chapters: dict[str, list[str]] = defaultdict(list)
    for rubric in sorted(rubrics):
        kept = []
        for term in rubrics[rubric]:
            words = tuple(sorted(re.findall(r"\w+", term.casefold())))
            if words not in seen:
                seen.add(words)
                kept.append(f"{term}\n")
        if kept:
            chapters[rubric[0]].append("".join(kept))
    for letter, blocks in chapters.items():
        family = "XY" if letter in "XY" else letter
        yield Text(f"{family}/{letter}.txt", family, "\n".join(blocks))


def read_licences(cache: Path) -> Corpus:
    """Licences and founding documents that Debian ships, by family."""
    texts: list[Text] = []
    found_in: list[Source] = []
    for package in (BASE_FILES, LICENSEE, DOC_DEBIAN):
        files = (path for path in fetch_package(package, cache).rglob("*") if path.is_file())
        found = list(licence_texts({path.name: path.read_bytes() for path in files}))
        texts += found
        found_in.append(_source(package, found, cache))
    return Corpus(tuple(texts), tuple(found_in))


def licence_texts(files: dict[str, bytes]) -> Iterator[Text]:
    """Texts of the files that are licences of a known family.

    Args:
        files: Contents by file name; names may end with .txt and .gz.
    """
    family_of = {stem: family for family, stems in FAMILIES.items() for stem in stems.split()}
    for name, raw in sorted(files.items()):
        stem = name.removesuffix(".gz").removesuffix(".txt")
        if stem in family_of:
            content = gzip.decompress(raw) if name.endswith(".gz") else raw
            family = family_of[stem]
            yield Text(f"{family}/{stem}.txt", family, clean_licence(content.decode()))


def clean_licence(text: str) -> str:
    """A licence without front matter, common indent, trailing space and runs of blank lines."""
    text = re.sub(r"\A---\n.*?\n---\n", "", text.replace("\r\n", "\n"), flags=re.DOTALL)
    text = textwrap.dedent(text.replace("\f", "\n").expandtabs())
    text = re.sub(r"[ \t]+$", "", text, flags=re.MULTILINE)
    return re.sub(r"\n{3,}", "\n\n", text).strip("\n") + "\n"


def general_kinds(budget: Budget, cache: Path) -> tuple[dict[str, dict[str, str]], list[Source]]:
    """General text by kind, the same for every domain and seed, and where it comes from."""
    texts = dict(corpus.general_texts(skip_chars=SKIPPED_CHARS, chars=PYTHON_CHARS))
    texts["python"] = {name: text[text.index("\n") + 1 :] for name, text in texts["python"].items()}
    folder = fetch_package(LIBREOFFICE, cache)
    german = [
        Text(f"{path.stem}.txt", path.stem, help_page(path.read_text(encoding="utf-8")))
        for path in sorted(folder.rglob("*.html"))
    ]
    texts["german"] = {text.name: text.text for text in german}
    kinds = {kind: _few(found, budget) for kind, found in sorted(texts.items())}
    sources = [
        _source(LIBREOFFICE, german, cache),
        Source(
            "Python's standard library",
            platform.python_version(),
            "PSF-2.0",
            sha256_of_texts(texts["python"]),
        ),
        Source("Moby-Dick, excerpts", "1851", "public domain", sha256_of_texts(texts["prose"])),
    ]
    return kinds, sources


def help_page(html: str) -> str:
    """Prose of a page of LibreOffice's help."""
    return "\n\n".join(paragraphs(html, LIBREOFFICE_SKIP)) + "\n"


def _few(texts: dict[str, str], budget: Budget) -> dict[str, str]:
    names = sorted(texts)
    random.Random(GENERAL_SEED).shuffle(names)
    return first_pieces([(name, texts[name]) for name in names], budget)


def first_pieces(texts: Sequence[tuple[str, str]], budget: Budget) -> dict[str, str]:
    """The first piece of each text that has a whole one, as many as fit the budget."""
    found: dict[str, str] = {}
    room = budget.general_bytes
    for name, text in texts:
        if size(text) < budget.general_document_bytes:
            continue
        piece = parts(text, budget.general_document_bytes)[0].strip("\n") + "\n"
        if size(piece) <= room:
            found[name] = piece
            room -= size(piece)
    return found
