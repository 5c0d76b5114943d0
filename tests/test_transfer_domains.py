"""Text domains of the transfer suite: cutting, splitting, reading markup; no network."""

import json
import random
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.transfer import debian, domains, sources
from bench.transfer.markup import paragraphs, thesaurus_terms
from bench.transfer.sources import Corpus, Source
from bench.transfer.splits import Budget, Text, beginning, middle, parts, size, split, whole
from examples.demo.corpus import choose
from trimtab.errors import InputError
from trimtab.text.documents import read_documents
from trimtab.text.duplicates import drop_near_duplicates
from trimtab.types import Document

BUDGET = Budget(
    train_bytes=6_000,
    validation_bytes=2_000,
    test_bytes=6_000,
    document_bytes=800,
    min_document_bytes=200,
)
WORDS = [f"{a}{b}{c}" for a in "bdfgklm" for b in "aeiouäöü" for c in "nrstx"]
ANY_TEXT = st.text(st.sampled_from("ab .\nä€𝄞"), max_size=300)


def prose(seed: int, n_bytes: int) -> str:
    """Paragraphs of random words, about so many bytes."""
    rng = random.Random(seed)
    found = ""
    while size(found) < n_bytes:
        lines = (" ".join(rng.choices(WORDS, k=rng.randrange(3, 12))) for _ in range(4))
        found += ".\n".join(lines) + ".\n\n"
    return found


def library(families: int = 14, members: int = 3, n_bytes: int = 1_000) -> list[Text]:
    return [
        Text(f"f{family:02}/{member}.txt", f"f{family:02}", prose(100 * family + member, n_bytes))
        for family in range(families)
        for member in range(members)
    ]


def deal(texts: list[Text], seed: int = 0, budget: Budget = BUDGET) -> dict[str, dict[str, str]]:
    return split(texts, budget, held_out=parts, train=parts, seed=seed)


@given(ANY_TEXT, st.integers(4, 60))
def test_parts_are_small_and_together_the_text(text: str, max_bytes: int) -> None:
    found = parts(text, max_bytes)
    assert "".join(found) == text
    assert all(0 < size(piece) <= max_bytes for piece in found)


def test_parts_end_at_paragraphs_lines_and_sentences() -> None:
    assert parts("aaaa\n\nbbbb\n\ncccc", 13) == ["aaaa\n\nbbbb\n\n", "cccc"]
    assert parts("aaaa\nbbbb\ncccc\ndddd\n", 10) == ["aaaa\nbbbb\n", "cccc\ndddd\n"]
    assert parts("Aa bb. Cc dd. Ee ff.", 9) == ["Aa bb. ", "Cc dd. ", "Ee ff."]
    sizes = [size(piece) for piece in parts(prose(1, 10_000), 4_000)]
    assert len(sizes) == 3 and min(sizes) > 2_500


@given(ANY_TEXT, st.integers(1, 120))
def test_the_middle_is_whole_lines_after_45_percent(text: str, max_bytes: int) -> None:
    found = middle(text, max_bytes)
    raw, from_byte = text.encode(), int(0.45 * size(text))
    start = raw.find(b"\n", from_byte) + 1
    if not found:
        fits = raw[start : start + max_bytes].rfind(b"\n") >= 0 or start + max_bytes >= len(raw)
        assert start == 0 or start == len(raw) or not fits
        return
    piece = found[0].encode()
    assert 0 < len(piece) <= max_bytes
    assert raw[start : start + len(piece)] == piece
    assert b"\n" not in raw[from_byte : start - 1]
    rest = raw[start + len(piece) :]
    assert not rest or piece.endswith(b"\n")
    next_line = rest[: rest.find(b"\n") + 1] or rest
    assert not rest or len(piece) + len(next_line) > max_bytes


@given(ANY_TEXT, st.integers(1, 120))
def test_the_beginning_is_whole_lines(text: str, max_bytes: int) -> None:
    found = beginning(text, max_bytes)
    piece = found[0] if found else ""
    assert text.startswith(piece) and size(piece) <= max_bytes
    rest = text[len(piece) :]
    assert not rest or not piece or piece.endswith("\n")
    next_line = rest[: rest.find("\n") + 1] or rest
    assert not rest or size(piece) + size(next_line) > max_bytes


def test_texts_of_which_the_middle_is_scored_have_their_beginnings_beside_it() -> None:
    texts = {text.name: text for text in library()}
    found = split(list(texts.values()), BUDGET, held_out=middle, train=whole, seed=0)
    assert set(found["beginnings"]) == set(found["test"])
    for name, document in found["beginnings"].items():
        assert texts[name].text.startswith(document) and size(document) <= BUDGET.document_bytes
    assert "beginnings" not in deal(list(texts.values()))


@pytest.mark.parametrize("seed", range(5))
def test_no_document_and_no_family_is_in_two_splits(seed: int) -> None:
    found = deal(library(), seed)
    texts = [text for documents in found.values() for text in documents.values()]
    assert len(set(texts)) == len(texts)
    families = {name: {n.split("/")[0] for n in documents} for name, documents in found.items()}
    assert not families["test"] & families["validation"]
    assert not (families["test"] | families["validation"]) & families["train"]
    assert len(families["test"]) >= 3
    sizes = {name: sum(map(size, documents.values())) for name, documents in found.items()}
    assert 6_000 <= sizes["test"] < 6_000 + 801
    assert 2_000 <= sizes["validation"] < 2_000 + 801
    assert 6_000 - 100 <= sizes["train"] <= 6_000
    held_out = [*found["test"].values(), *found["validation"].values()]
    assert all(200 <= size(text) <= 801 for text in held_out)


def test_a_split_is_the_same_again_and_another_with_another_seed() -> None:
    texts = library()
    shuffled = texts.copy()
    random.Random(3).shuffle(shuffled)
    assert deal(texts) == deal(shuffled)
    assert len({tuple(deal(texts, seed)["test"]) for seed in range(5)}) == 5


def test_training_text_grows_at_its_end_and_leaves_the_others_alone() -> None:
    texts = library()
    small, large = deal(texts), deal(texts, budget=replace(BUDGET, train_bytes=9_000))
    assert small["test"] == large["test"] and small["validation"] == large["validation"]
    assert "".join(large["train"].values()).startswith("".join(small["train"].values()))
    other = deal(texts, budget=replace(BUDGET, validation_bytes=3_000))
    assert other["test"] == small["test"]


def test_a_family_of_more_than_a_third_is_for_training() -> None:
    large = Text("large/1.txt", "large", prose(7, 30_000))
    for seed in range(5):
        found = deal([*library(), large], seed)
        assert not any("large" in n for n in (*found["test"], *found["validation"]))
        assert any("large" in name for name in found["train"])


def test_spare_texts_only_fill_up_training() -> None:
    texts = library(families=10, members=2)
    spare = [replace(t, name=f"spare/{t.name}", family="spare", spare=True) for t in library(3)]
    spare = [replace(t, text=prose(5_000 + i, 1_000)) for i, t in enumerate(spare)]
    found = deal([*texts, *spare], budget=replace(BUDGET, train_bytes=14_000))
    is_spare = [name.startswith("spare") for name in found["train"]]
    assert is_spare == sorted(is_spare) and any(is_spare) and not all(is_spare)
    assert not any("spare" in name for name in (*found["test"], *found["validation"]))
    small = deal([*texts, *spare])
    assert not any(name.startswith("spare") for name in small["train"])


def test_twins_of_a_whole_text_are_in_no_other_split() -> None:
    """The middle of a file is no near-duplicate of its twin, but the whole file is one."""
    plain = [Text(f"{n}.zig", f"{n}", prose(n, 1_500)) for n in range(40)]
    twins = [replace(t, name=f"twin-{t.name}", family=f"twin-{t.family}") for t in plain]
    twins = [replace(t, text=t.text + prose(900 + i, 200)) for i, t in enumerate(twins)]
    found = split([*plain, *twins], BUDGET, held_out=middle, train=whole, seed=0)
    splits = ("test", "validation", "train")
    kept = [{name.removeprefix("twin-") for name in found[split]} for split in splits]
    assert not kept[0] & kept[1] and not (kept[0] | kept[1]) & kept[2]
    assert len(kept[0]) == len(found["test"])
    tests = [Document(name, text) for name, text in found["test"].items()]
    missed = [Document(t.name, t.text) for t in twins if t.name.removeprefix("twin-") in kept[0]]
    assert missed and not drop_near_duplicates(missed, tests).dropped


def test_test_documents_are_no_near_duplicates_of_each_other() -> None:
    texts = library(families=20, members=1)
    copies = [replace(t, name=f"{t.name}.copy", text=f"{t.text}the end\n") for t in texts]
    found = deal([*texts, *copies])["test"]
    documents = [Document(name, text) for name, text in found.items()]
    for place, document in enumerate(documents):
        assert not drop_near_duplicates([document], documents[:place]).dropped


@pytest.mark.parametrize("name", ["test_bytes", "validation_bytes", "train_bytes"])
def test_too_little_text_says_how_much_there_is(name: str) -> None:
    words = rf"fills [\d,]+ bytes of {name.split('_')[0]} documents, where 500,000 are wanted"
    with pytest.raises(InputError, match=words):
        deal(library(), budget=replace(BUDGET, **{name: 500_000}))


@pytest.mark.parametrize("name", ["test_bytes", "document_bytes", "general_bytes"])
def test_sizes_that_nothing_fits_are_refused(name: str) -> None:
    with pytest.raises(InputError, match="no text fits"):
        replace(BUDGET, **{name: 0})


def test_tables_of_zig_are_no_programs(tmp_path: Path, monkeypatch) -> None:
    for number in range(6):
        (tmp_path / f"{number}.zig").write_text(prose(number, 4_000))
    (tmp_path / "large.zig").write_text(prose(9, 20_000))
    (tmp_path / "table.zig").write_text("0x1234, " * 600)
    (tmp_path / "small.zig").write_text("const a = 1;\n")
    monkeypatch.setattr(sources.corpus, "fetch_zig", lambda cache: cache)
    found = {text.name: text.spare for text in sources.read_zig(tmp_path).texts}
    assert found == {**{f"{n}.zig": False for n in range(6)}, "large.zig": True}
    assert set(found) <= set(choose(tmp_path, sources.corpus.Choice(max_bytes=64_000))["test"])


PAGE = """<?xml version="1.0"?><!DOCTYPE html><html><head><title>Kopf</title>
<link rel="up" href="{up}.html" title="x" /><meta name="a" content="b"></head><body>
<ul class="docnav top"><li><a href="a.html"><strong>Zur&uuml;ck</strong></a></li></ul>
<div class="section"><h2 class="title"><a id="x"></a>1.1. {title}</h2><div class="para">
   Der Befehl <code class="command">ls</code> zeigt  2<sup>24</sup>
   Dateien &amp; Ordner.<a class="indexterm" id="i"></a> <div class="url">→ <a>http://x.org</a></div>
</div><pre class="screen">$ <b>ls</b> &lt;x&gt;</pre><div class="para">{more}</div>
<ul><li><p>Erstens<br>zweitens</p></li><li>drittens</ul></div>
<script>if (a < b) document.write("<p>nein</p>");</script></body></html>"""


def test_a_page_is_read_without_its_markup() -> None:
    page = PAGE.format(up="kapitel", title="Dateien", more="Ende.")
    found = paragraphs(page, sources.HANDBOOK_SKIP)
    assert found == [
        "1.1. Dateien",
        "Der Befehl ls zeigt 2^24 Dateien & Ordner.",
        "Ende.",
        "Erstens",
        "zweitens",
        "drittens",
    ]
    assert paragraphs("<p>a<p>b</div></p><img>c<td>d</td>e") == ["a", "b", "c", "d", "e"]
    assert paragraphs("<div class='x toc'><p>a</p><br>b</div>c", frozenset({".toc"})) == ["c"]


def test_what_was_not_translated_is_left_out_and_chapters_are_families() -> None:
    more = "The package contains an extension (siehe Abschnitt 8.2) that is of use to you."
    german = {
        "index.html": PAGE.format(up="no", title="-", more="-").replace('rel="up"', ""),
        "kapitel.html": PAGE.format(up="index", title="Eins", more="Nur hier."),
        "abschnitt.html": PAGE.format(up="kapitel", title="Zwei", more=more),
    }
    english = {"x.html": "<p>Ende.</p><p>drittens</p>"}
    found = list(sources.handbook_sections(german, english, sources.is_english))
    assert [(text.name, text.family) for text in found] == [
        ("kapitel/abschnitt.txt", "kapitel"),
        ("kapitel/kapitel.txt", "kapitel"),
    ]
    assert "Nur hier." in found[1].text and "Erstens\n\nzweitens\n" in found[1].text
    assert "extension" not in found[0].text and "drittens" not in found[0].text
    assert not any(mark in text.text for text in found for mark in ("<", "http", "Zur"))


def test_a_paragraph_is_of_the_script_of_most_of_its_letters() -> None:
    russian = "Команда apt-get install ставит пакет."
    assert not sources.is_outside(sources.CYRILLIC, russian)
    assert not sources.is_outside(sources.JAPANESE, "apt コマンドは便利なパッケージ管理です。")
    for text in ("The package Пакет.", "apt-get install", "1.2.3", ""):
        assert sources.is_outside(sources.CYRILLIC, text)
    assert sources.is_outside(sources.JAPANESE, russian)


def entry(rubric: str, term: str) -> str:
    return (
        "INSERT INTO ref.icpc_thesaurus (synonym, fk_code) VALUES (\n"
        f"\t'{term}',\n\t(SELECT pk_coding_system\n\t FROM ref.icpc\n\t WHERE\n"
        f"\t \tcode = '{rubric}'\n\t \t\tAND\n"
        "\t \tfk_data_source = (SELECT pk FROM ref.data_source WHERE lang = 'de')\n\t)\n);\n"
    )


def test_terms_are_read_from_sql() -> None:
    sql = "-- code = 'X1'\n\\set ON_ERROR_STOP 1\n" + entry("S08", "''Augen''ringe")
    sql += entry("L29", "Schmerz  der\tHüfte") + "DELETE FROM t WHERE code = 'A1';"
    assert list(thesaurus_terms(sql)) == [("S08", "'Augen'ringe"), ("L29", "Schmerz der Hüfte")]


def test_no_term_is_in_two_chapters() -> None:
    sql = "".join(
        (
            *(entry("X70", term) for term in ("Lues", "Lues, späte [kodiere zusätzlich G01*]")),
            *(entry("A78", term) for term in ("Späte Lues", "Fieber", "fieber")),
            *(entry("A03", term) for term in ("Fieber", "Schüttelfrost")),
            *(entry("Y70", term) for term in ("Lues", "Tripper")),
        )
    )
    found = {text.name: (text.family, text.text) for text in sources.medical_chapters(sql)}
    assert found == {
        "A/A.txt": ("A", "Fieber\nSchüttelfrost\n\nSpäte Lues\n"),
        "XY/X.txt": ("XY", "Lues\n"),
        "XY/Y.txt": ("XY", "Tripper\n"),
    }


def test_licences_are_clean_and_have_one_family_each() -> None:
    raw = "---\ntitle: GPL\n---\n\n  LICENCE \t\r\n\r\n\r\n\r\n    1. You may.\r\n\tif\f---\nno\n"
    files = {"gpl-3.0.txt": raw.encode(), "unknown.txt": b"x", "vim.txt": "ü\n".encode()}
    found = list(sources.licence_texts(files))
    assert [(text.name, text.family) for text in found] == [
        ("gnu/gpl-3.0.txt", "gnu"),
        ("vim/vim.txt", "vim"),
    ]
    assert found[0].text == "  LICENCE\n\n    1. You may.\n        if\n---\nno\n"
    names = [name for names in sources.FAMILIES.values() for name in names.split()]
    assert len(set(names)) == len(names)
    gnu = sources.FAMILIES["gnu"].lower()
    assert not any("gpl" in name.lower() and name.lower() not in gnu for name in names)


HELP = "<header>Hilfe</header><h1>Seite {}</h1><p>{}</p><footer><p>debug</p></footer>"


@pytest.fixture
def cache(tmp_path: Path) -> Iterator[Path]:
    """A cache where the package of the general German text lies as a file to unpack."""
    if shutil.which("dpkg-deb") is None:
        pytest.skip("needs dpkg-deb")
    tree = tmp_path / "tree"
    pages = tree / "usr" / "help" / "de" / "text" / "swriter" / "guide"
    pages.mkdir(parents=True)
    (tree / "DEBIAN").mkdir()
    (tree / "DEBIAN" / "control").write_text(
        "Package: libreoffice-help-de\nVersion: 4:9.9-1\nArchitecture: all\n"
        "Maintainer: x <x@example.org>\nDescription: x\n"
    )
    for number in range(9):
        (pages / f"{number}.html").write_text(HELP.format(number, prose(number, 1_500)))
    (pages / "0.txt").write_text("no page")
    (pages / "link.html").symlink_to("/etc/passwd")
    archive = tmp_path / "cache" / "debian" / "libreoffice-help-de_9.9-1_all.deb"
    archive.parent.mkdir(parents=True)
    subprocess.run(["dpkg-deb", "-b", str(tree), str(archive)], check=True, capture_output=True)
    yield tmp_path / "cache"


def tiny_domain() -> domains.Domain:
    source = Source("none", "1", "CC0-1.0", "0")
    found = Corpus(tuple(library()), (source,))
    return domains.Domain("tiny", "Tiny", "CC0-1.0", lambda _: found, (), BUDGET)


def test_a_given_package_is_unpacked_once(cache: Path) -> None:
    package = sources.LIBREOFFICE
    assert not debian.is_fetched(package, cache)
    folder = debian.fetch_package(package, cache)
    names = sorted(path.name for path in folder.rglob("*") if path.is_file())
    assert names == [".complete", *(f"{n}.html" for n in range(9))]
    assert debian.version_of(package, cache) == "4:9.9-1"
    (archive,) = cache.rglob("*.deb")
    archive.unlink()
    assert debian.fetch_package(package, cache) == folder
    wider = replace(package, keep=r"\.txt$")
    assert not debian.is_fetched(wider, cache)


def test_a_package_without_the_wanted_files_leaves_nothing(cache: Path) -> None:
    package = replace(sources.LIBREOFFICE, keep=r"\.sql$")
    with pytest.raises(InputError, match=r"has no file that matches .*\n.*Debian mirror"):
        debian.fetch_package(package, cache)
    assert [path.suffix for path in (cache / "debian").iterdir()] == [".deb"]


def test_a_package_that_cannot_be_fetched_names_the_alternative(
    monkeypatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    words = r"apt-get is not on this machine.*\n.*debian-handbook 11.* Debian mirror.*leave"
    with pytest.raises(InputError, match=words):
        debian.fetch_package(sources.HANDBOOK, tmp_path / "cache")
    (tmp_path / "apt-get").write_text("#!/bin/sh\necho no network >&2\nexit 100\n")
    (tmp_path / "apt-get").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    with pytest.raises(InputError, match=r"status 100 and said: no network"):
        debian.fetch_package(sources.HANDBOOK, tmp_path / "cache")
    assert list((tmp_path / "cache" / "debian").iterdir()) == []


def test_a_layout_is_whole_and_the_same_again(cache: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    record = domains.lay_out(tiny_domain(), folder, cache=cache)
    assert json.loads((folder / domains.SOURCE_FILE).read_text()) == record
    kinds = {f"general/{kind}" for kind in ("german", "prose", "python")}
    assert set(record["texts"]) == {"train", "validation", "test"} | kinds
    for group, found in record["texts"].items():
        documents = read_documents([str(folder / group)])
        assert len(documents) == found["documents"]
        assert sum(size(document.text) for document in documents) == found["bytes"]
        names = {d.name.removeprefix(f"{folder / group}/"): d.text for d in documents}
        assert debian.sha256_of_texts(names) == found["sha256"]
    for kind in kinds:
        assert 6_000 < record["texts"][kind]["bytes"] <= 8_000
        for document in read_documents([str(folder / kind)]):
            assert size(document.text) <= 1_201
            assert "Redistribution" not in document.text and "debug" not in document.text
    before = (folder / "source.json").stat().st_ino
    assert domains.lay_out(tiny_domain(), folder, cache=cache) == record
    assert (folder / "source.json").stat().st_ino == before
    other = domains.lay_out(tiny_domain(), folder, seed=1, cache=cache)
    assert other["texts"]["test"] != record["texts"]["test"]
    assert all(other["texts"][kind] == record["texts"][kind] for kind in kinds)
    assert "4:9.9-1" in domains.summary(other) and "seed 1" in domains.summary(other)


def test_the_fingerprint_sees_names_and_contents() -> None:
    variants = [{"a": "bc"}, {"ab": "c"}, {"a": "bd"}, {"a": "bc", "b": ""}, {}]
    assert len({debian.sha256_of_texts(texts) for texts in variants}) == len(variants)
    assert debian.sha256_of_texts({"a": "1", "b": "2"}) == debian.sha256_of_texts(
        {"b": "2", "a": "1"}
    )


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["nonsense"], "there is no domain 'nonsense'"),
        (["zig", "--test-bytes", "0"], "no text fits"),
    ],
)
def test_the_command_refuses_bad_input_in_words(
    words: list[str], said: str, tmp_path: Path, capsys
) -> None:
    with pytest.raises(SystemExit) as end:
        domains.main([*words, "--to", str(tmp_path / "out")])
    captured = capsys.readouterr()
    assert end.value.code == 2
    assert said in captured.err and "hint:" in captured.err and "Traceback" not in captured.err
