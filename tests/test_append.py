"""Text appended to a memory: the entries that a recording would have made, and nothing else."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_generate import HOST, domain_text, made_adapter

from trimtab.append import AppendResult, append
from trimtab.backends.hf import HFModel
from trimtab.backends.open import open_model
from trimtab.carriers.memory import documents_of, joined, last_bytes, sources_of
from trimtab.carriers.sources import place_of
from trimtab.cli import main
from trimtab.config import AppendConfig, FitConfig, MountConfig, RecordConfig
from trimtab.errors import AdapterError, InputError, ModelError
from trimtab.fit import fit
from trimtab.fitting import appending
from trimtab.fitting.memory import entries_of
from trimtab.mount import mount
from trimtab.record import record
from trimtab.steering.host_states import WINDOW_TOKENS
from trimtab.steering.mounted import Mounted
from trimtab.store.adapter import MEMORY_FILE, read_memory
from trimtab.store.home import trimtab_home
from trimtab.store.manifest import read_manifest
from trimtab.store.recording import Recording
from trimtab.types import Advance


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made_adapter(tmp_path_factory.getbasetemp())


@pytest.fixture(autouse=True)
def _home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRIMTAB_HOME", str(tmp_path / "home"))


@pytest.fixture
def adapter(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "adapter"))


@pytest.fixture
def new_text(tmp_path: Path) -> Path:
    folder = tmp_path / "new"
    folder.mkdir()
    for number in range(20, 24):
        (folder / f"{number}.txt").write_text(domain_text(number) + "\nÄnderung am Ruder ⚓.\n")
    return folder


def grow(adapter: Path, *data: Path, **options: object) -> AppendResult:
    settings = {"adapter": adapter, "data": tuple(map(str, data)), "dtype": "float32"} | options
    return append(AppendConfig.model_validate(settings))


def seated(adapter: Path, host: HFModel, **options: object) -> Mounted:
    settings = {"adapter": adapter, "host": HOST} | options
    return mount(MountConfig.model_validate(settings), host=host)


@pytest.fixture(scope="module")
def host() -> HFModel:
    return open_model(HOST, dtype="float32")


def test_appended_entries_are_those_that_a_recording_makes(
    original: Path, adapter: Path, new_text: Path, tmp_path: Path
) -> None:
    grown = grow(adapter, new_text)
    recording = record(
        RecordConfig(
            expert=original.parent / "expert",
            out=tmp_path / "recording",
            data=(str(new_text),),
            dtype="float32",
        )
    ).folder
    opened = Recording.open(recording)
    columns, names = opened.read("train"), [d.name for d in opened.documents("train")]
    before = read_memory(original, read_manifest(original)).memory
    base = open_model("tiny:llama?hidden=32", dtype="float32")
    recorded = entries_of(base.vocabulary, columns, before.projection, before.mean, names)
    expected, found = joined(before, [recorded]), read_memory(adapter, grown.manifest).memory
    assert torch.equal(found.text, expected.text)
    assert torch.equal(found.positions, expected.positions)
    assert found.sources == expected.sources
    torch.testing.assert_close(found.keys, expected.keys, atol=2e-3, rtol=0)
    assert torch.equal(found.keys[: len(before)], before.keys)
    assert grown.entries == len(recorded) == grown.manifest.carriers["memory"].entries - len(before)


def test_a_memory_finds_what_was_appended_and_where_it_stands(
    adapter: Path, new_text: Path, host: HFModel
) -> None:
    grow(adapter, new_text)
    steered = seated(adapter, host)
    assert steered.memory
    said = "\nÄnderung am Ru"
    ids = torch.tensor([host.context_ids() + host.encode(said)])
    answer = steered.memory.ask(host.hidden(ids)[0, -1:], last_bytes([said.encode()]))
    best = int(answer.found.entries[0, answer.found.matched_bytes[0].argmax()])
    memory = steered.memory.memory
    position = int(memory.positions[best])
    assert bytes(memory.text[position : position + 3].tolist()) == b"der"
    place = place_of(sources_of(memory), memory.text, position)
    assert place.source in {f"{number}.txt" for number in range(20, 24)} and place.line == 31
    documents = documents_of(memory.text)[0]
    assert [text.decode() for text in documents[-4:]] == [
        path.read_text() for path in sorted(new_text.iterdir())
    ]


def test_what_is_appended_changes_nothing_else(
    original: Path, adapter: Path, new_text: Path
) -> None:
    manifest = grow(adapter, new_text, data_licence="CC0-1.0").manifest
    before = read_manifest(original)
    changed = {p for p in manifest.files if manifest.files[p] != before.files.get(p)}
    assert changed == {MEMORY_FILE, "README.md"}
    assert read_manifest(adapter) == manifest and manifest.files.keys() == before.files.keys()
    assert manifest.memory and before.memory
    assert manifest.memory.gate == before.memory.gate
    assert manifest.licences.data == "CC0-1.0"
    assert manifest.provenance.inputs.keys() - before.provenance.inputs.keys() == {"appended"}
    assert manifest.memory.grown_from[0].sha256 == before.files[MEMORY_FILE].sha256


def test_text_is_appended_once(adapter: Path, new_text: Path) -> None:
    (new_text / "again.txt").write_text((new_text / "20.txt").read_text())
    first = grow(adapter, new_text)
    assert (first.documents, first.known) == (4, 1)
    files = {path: path.read_bytes() for path in adapter.rglob("*") if path.is_file()}
    again = grow(adapter, new_text)
    assert (again.documents, again.known, again.entries) == (0, 5, 0)
    assert files == {path: path.read_bytes() for path in adapter.rglob("*") if path.is_file()}
    (new_text / "more.txt").write_text("The tide turns the buoy. The buoy turns the tide.")
    third = grow(adapter, new_text)
    assert third.documents == 1 and "1 documents with" in third.summary()
    assert {"appended", "appended-2"} <= third.manifest.provenance.inputs.keys()
    assert third.manifest.memory and len(third.manifest.memory.grown_from) == 2


def test_a_copy_grows_and_the_adapter_stays(
    original: Path, adapter: Path, new_text: Path, tmp_path: Path
) -> None:
    out = tmp_path / "grown"
    first = grow(adapter, new_text, out=out)
    assert read_manifest(adapter) == read_manifest(original)
    assert read_manifest(out) == first.manifest
    assert grow(adapter, new_text, out=out).manifest == first.manifest
    with pytest.raises(InputError, match="holds an adapter that was made otherwise"):
        grow(adapter, new_text / "20.txt", out=out)
    assert read_manifest(out) == first.manifest


def test_seats_of_a_grown_memory_are_those_made_anew(
    adapter: Path, new_text: Path, host: HFModel
) -> None:
    def seats() -> int:
        return len(list((trimtab_home() / "mounts").iterdir()))

    seated(adapter, host)
    grow(adapter, new_text)
    count = seats()
    grown = seated(adapter, host)
    assert seats() == count + 1
    anew = seated(adapter, host, cache=False)
    assert grown.memory and anew.memory
    assert torch.equal(grown.memory.values, anew.memory.values)
    assert torch.equal(grown.memory.shares, anew.memory.shares)
    assert torch.equal(grown.memory.reading.matrix, anew.memory.reading.matrix)
    assert len(grown.memory.values) == len(grown.memory.memory)


def test_an_interrupted_run_goes_on(
    adapter: Path, new_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(appending, "PIECE_TOKENS", 400)
    whole = grow(adapter, new_text, out=tmp_path / "whole")

    @contextmanager
    def stopping(label: str, total: int) -> Iterator[Advance]:
        counted: list[int] = []

        def advance(count: int) -> None:
            counted.append(count)
            if label.startswith("reading the new") and sum(counted) > total // 2:
                raise KeyboardInterrupt

        yield advance

    config = AppendConfig(
        adapter=adapter, data=(str(new_text),), out=tmp_path / "stopped", dtype="float32"
    )
    with pytest.raises(KeyboardInterrupt):
        append(config, progress=stopping)
    kept = list((trimtab_home() / "appending").iterdir())
    assert kept and not (tmp_path / "stopped").exists()
    counted: dict[str, list[int]] = {}

    @contextmanager
    def counting(label: str, total: int) -> Iterator[Advance]:
        counted[label] = []
        yield counted[label].append

    assert append(config, progress=counting).manifest.files == whole.manifest.files
    # What was kept counts at once; what is read comes in windows.
    advances = counted["reading the new text (tokens)"]
    assert sum(advance > WINDOW_TOKENS for advance in advances) == len(kept)
    assert not list((trimtab_home() / "appending").iterdir())


def test_near_duplicates_of_test_files_are_left_out(adapter: Path, new_text: Path) -> None:
    test = new_text.parent / "test.txt"
    test.write_text((new_text / "21.txt").read_text().replace("⚓", "anchor"))
    grown = grow(adapter, new_text, against=(str(test),))
    assert (grown.documents, grown.near_duplicates, grown.known) == (3, 1, 0)
    assert "repeat a test file" in grown.summary()


def test_what_cannot_grow_is_refused(
    original: Path, adapter: Path, new_text: Path, tmp_path: Path
) -> None:
    recording = original.parent / "recording"
    fitting = FitConfig(recording=recording, out=tmp_path / "soft", key_size=16, epochs=1)
    fit(fitting.model_copy(update={"values": "soft", "carriers": ("memory",)}))
    with pytest.raises(AdapterError, match="soft"):
        grow(tmp_path / "soft", new_text)
    fit(fitting.model_copy(update={"out": tmp_path / "head", "carriers": ("head",)}))
    with pytest.raises(AdapterError, match="no memory to append to; it carries head"):
        grow(tmp_path / "head", new_text)
    with pytest.raises(ModelError, match="expected"):
        grow(adapter, new_text, small="tiny:llama?hidden=32&seed=1")
    with pytest.raises(InputError):
        grow(adapter, tmp_path / "nothing")
    assert read_manifest(adapter) == read_manifest(original)


def test_it_is_a_command(adapter: Path, new_text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["append", str(adapter), str(new_text), "--dtype", "float32"])
    assert ended.value.code == 0
    assert "4 documents with" in capsys.readouterr().out
    grown = read_memory(adapter, read_manifest(adapter)).memory
    assert len(documents_of(grown.text)[0]) == len(replace(grown).sources.names)  # pyright: ignore
