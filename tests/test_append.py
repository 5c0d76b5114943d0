"""Text appended to a memory: the entries that a recording would have made, and nothing else."""

import json
import shutil
import stat
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from joining import joined
from safetensors.torch import load_file
from test_generate import HOST, domain_text, made_adapter

from trimtab.append import AppendResult, append
from trimtab.backends.hf import HFModel
from trimtab.backends.open import open_model
from trimtab.carriers.gate import GATE_FEATURES
from trimtab.carriers.memory import Memory, documents_of, last_bytes, sources_of, unit_keys
from trimtab.carriers.sources import place_of, travelling_names
from trimtab.cli import main
from trimtab.config import AppendConfig, FitConfig, MountConfig, RecordConfig
from trimtab.errors import AdapterError, InputError, ModelError
from trimtab.fit import fit
from trimtab.fitting import appending
from trimtab.fitting.memory import entries_of
from trimtab.mount import is_kept, mount
from trimtab.record import record
from trimtab.steering.host_states import WINDOW_TOKENS
from trimtab.steering.mounted import Mounted
from trimtab.store.adapter import MEMORY_FILE, MemoryFile, read_memory, write_memory
from trimtab.store.adapter_schema import Gate
from trimtab.store.card import write_adapter
from trimtab.store.home import trimtab_home
from trimtab.store.index import Listed, index_path, lists_before, no_entries, write_index
from trimtab.store.manifest import read_manifest
from trimtab.store.recording import Recording
from trimtab.store.seats import Seats
from trimtab.types import Advance, silent


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
    for number in range(20, 24):
        path = folder / ("even" if number % 2 == 0 else "odd/deep") / f"{number}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(domain_text(number) + "\nÄnderung am Ruder ⚓.\n")
    return folder


LABEL = "reading the new text (tokens)"
NAMES = {"even/20.txt", "even/22.txt", "odd/deep/21.txt", "odd/deep/23.txt"}


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
            window_tokens=256,
            stride_tokens=192,
            dtype="float32",
        )
    ).folder
    opened = Recording.open(recording)
    columns, names = opened.read("train"), [d.name for d in opened.documents("train")]
    before = read_memory(original, read_manifest(original)).memory
    base = open_model("tiny:llama?hidden=32", dtype="float32")
    answered = columns["next_ids"] >= 0
    states = columns["reference_hidden"][answered]
    keys = unit_keys(states, before.projection, before.mean)
    recorded = entries_of(base.vocabulary, columns, keys, travelling_names(names))
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
    assert place.source in NAMES and place.line == 31
    documents = documents_of(memory.text)[0]
    assert [text.decode() for text in documents[-4:]] == [
        path.read_text() for path in sorted(new_text.rglob("*.txt"))
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
    (new_text / "again.txt").write_text((new_text / "even" / "20.txt").read_text())
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
        grow(adapter, new_text / "even" / "20.txt", out=out)
    assert read_manifest(out) == first.manifest


def test_another_adapter_of_the_same_memory_is_left_alone(
    adapter: Path, new_text: Path, tmp_path: Path
) -> None:
    grown, copied = tmp_path / "grown", tmp_path / "copied"
    for folder in (grown, copied):
        if folder == grown:
            grow(adapter, new_text, out=grown)
        else:
            # Here no text is new.
            grow(adapter, new_text)
            shutil.copytree(adapter, copied)
        manifest = read_manifest(folder)
        assert manifest.memory
        gate = Gate(features=GATE_FEATURES, weights=(0.0,) * len(GATE_FEATURES))
        memory = manifest.memory.model_copy(update={"gate": gate})
        carriers = {**manifest.carriers, "memory": memory}
        other = write_adapter(folder, manifest.model_copy(update={"carriers": carriers}))
        with pytest.raises(InputError, match="holds an adapter that was made otherwise"):
            grow(adapter, new_text, out=folder, data_licence="CC0-1.0")
        assert read_manifest(folder) == other


def test_what_a_grown_memory_is_kept_as_is_what_is_made_anew(
    adapter: Path,
    new_text: Path,
    tmp_path: Path,
    host: HFModel,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Byte for byte: the memory's file, the lists under the same centres, and the seats."""
    monkeypatch.setattr("trimtab.store.index.LISTED_ENTRIES", 1_000)
    monkeypatch.setattr("trimtab.carriers.search.LISTED_ENTRIES", 1_000)
    seated(adapter, host)
    made: list[Memory] = []

    def spied(*given: Any) -> Memory:
        made.append(appending.new_entries(*given))
        return made[-1]

    monkeypatch.setattr(sys.modules["trimtab.append"], "new_entries", spied)
    file = read_memory(adapter, read_manifest(adapter))
    out = tmp_path / "grown"
    for count, data in enumerate(("even", "odd"), start=1):
        manifest = grow(adapter if count == 1 else out, new_text / data, out=out).manifest
        mounted = seated(out, host)
        whole = joined(file.memory, made)
        assert len(made) == count and len(whole) == len(file.memory) + sum(map(len, made))
        write_memory(tmp_path / "anew", MemoryFile(whole, file.probe_features))
        assert (out / MEMORY_FILE).read_bytes() == (tmp_path / "anew" / MEMORY_FILE).read_bytes()
        index = index_path(manifest.files[MEMORY_FILE].sha256)
        centres = load_file(index)["centres"]
        write_index(tmp_path / "index", whole, silent, no_entries(centres))
        assert index.read_bytes() == (tmp_path / "index").read_bytes()
        anew = seated(out, host, cache=False)
        assert mounted.memory and anew.memory
        assert torch.equal(mounted.memory.values, anew.memory.values)
        assert torch.equal(mounted.memory.shares, anew.memory.shares)
        assert (mounted.memory.index.contexts == anew.memory.index.contexts).all()


def test_seats_of_a_grown_memory_are_those_made_anew(
    adapter: Path, new_text: Path, host: HFModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    seated(adapter, host)
    grow(adapter, new_text)
    anew = seated(adapter, host, cache=False)

    def forbidden(*_: object) -> Seats:
        raise AssertionError("all was computed anew")

    monkeypatch.setattr(sys.modules["trimtab.mount"], "find_seats", forbidden)
    settings = MountConfig(adapter=adapter, host=HOST)
    assert is_kept(settings, host)
    grown = seated(adapter, host)
    assert grown.memory and anew.memory
    assert torch.equal(grown.memory.values, anew.memory.values)
    assert torch.equal(grown.memory.shares, anew.memory.shares)
    assert torch.equal(grown.memory.reading.matrix, anew.memory.reading.matrix)
    assert len(grown.memory.values) == len(grown.memory.memory)


def test_an_interrupted_run_goes_on(
    adapter: Path, new_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Two documents a shard, and a part of the next.
    monkeypatch.setattr(appending, "SHARD_TOKENS", 1_800)
    whole = grow(adapter, new_text, out=tmp_path / "whole")

    @contextmanager
    def stopping(label: str, total: int) -> Iterator[Advance]:
        counted: list[int] = []

        def advance(count: int) -> None:
            counted.append(count)
            if label == LABEL and sum(counted) > 0.7 * total:
                raise KeyboardInterrupt

        yield advance

    config = AppendConfig(
        adapter=adapter, data=(str(new_text),), out=tmp_path / "stopped", dtype="float32"
    )
    with pytest.raises(KeyboardInterrupt):
        append(config, progress=stopping)
    (kept,) = (trimtab_home() / "appending").glob("*/*.safetensors")
    assert not (tmp_path / "stopped").exists()
    counted: dict[str, list[int]] = {}

    @contextmanager
    def counting(label: str, total: int) -> Iterator[Advance]:
        counted[label] = []
        yield counted[label].append

    assert append(config, progress=counting).manifest.files == whole.manifest.files
    # What was kept counts at once; what is read comes in windows.
    assert sum(advance > WINDOW_TOKENS for advance in counted[LABEL]) == 1
    assert not kept.parent.exists()


def test_text_is_read_in_the_windows_of_the_recording(
    original: Path, adapter: Path, new_text: Path
) -> None:
    assert read_manifest(original).provenance.record["window_tokens"] == 256
    manifest = json.loads((adapter / "manifest.json").read_text())
    manifest["provenance"]["record"] |= {"window_tokens": 64, "stride_tokens": 32}
    (adapter / "manifest.json").write_text(json.dumps(manifest))
    usual, short = adapter.parent / "usual", adapter.parent / "short"
    grow(original, new_text, out=usual)
    grow(adapter, new_text, out=short)
    one, two = (read_memory(path, read_manifest(path)).memory for path in (usual, short))
    assert torch.equal(one.positions, two.positions)
    first = sources_of(one).starts[-4]
    early = (one.positions >= first) & (one.positions < first + 32)
    later = one.positions > first + 200
    torch.testing.assert_close(one.keys[early], two.keys[early], atol=2e-3, rtol=0)
    assert (one.keys[later].float() - two.keys[later].float()).abs().max() > 0.01


def test_documents_without_two_tokens_or_told_twice_are_passed_over(
    adapter: Path, tmp_path: Path
) -> None:
    lines = [
        {"text": "x"},
        {"text": "The keel.\0\0 The buoy."},
        {"text": "\0The mast."},
        {"prompt": "The ", "completion": "rope."},
        {"text": "The rope."},
    ]
    path = tmp_path / "lines.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    first = grow(adapter, path)
    assert (first.documents, first.left_out, first.known) == (3, 1, 1)
    again = grow(adapter, path)
    assert (again.documents, again.left_out, again.known) == (0, 1, 4)


def test_what_is_the_users_own_stays(adapter: Path, new_text: Path) -> None:
    (adapter / ".git").mkdir()
    (adapter / ".git" / "HEAD").write_text("ref: refs/heads/main\n")
    (adapter / ".gitattributes").write_text("*.safetensors filter=lfs\n")
    adapter.chmod(0o700)
    grow(adapter, new_text)
    assert (adapter / ".git" / "HEAD").read_text() == "ref: refs/heads/main\n"
    assert (adapter / ".gitattributes").is_file()
    assert stat.S_IMODE(adapter.stat().st_mode) == 0o700
    assert stat.S_IMODE((adapter / MEMORY_FILE).stat().st_mode) == 0o600
    assert sorted(path.name for path in adapter.parent.iterdir()) == ["adapter", "home", "new"]


@pytest.mark.parametrize("name", ["adapter", "beside"])
def test_terms_change_without_new_text(name: str, adapter: Path, new_text: Path) -> None:
    out = adapter.parent / name
    grow(adapter, new_text, out=out)
    before = read_manifest(out)
    changed = grow(adapter, new_text, out=out, data_licence="MIT")
    assert changed.manifest.licences.data == "MIT" and changed.entries == 0
    assert read_manifest(out) == changed.manifest
    assert changed.manifest.carriers == before.carriers
    assert changed.manifest.files[MEMORY_FILE] == before.files[MEMORY_FILE]
    assert changed.manifest.provenance == before.provenance


def test_a_copy_without_new_text_is_made_once(adapter: Path, new_text: Path) -> None:
    grow(adapter, new_text)
    out = adapter.parent / "copy"
    first = grow(adapter, new_text, out=out)
    assert first.manifest.carriers == read_manifest(adapter).carriers
    again = grow(adapter, new_text, out=out)
    assert (again.manifest, again.documents, again.known) == (first.manifest, 0, 4)


def test_a_memory_that_grew_after_its_manifest_was_read_is_said(
    adapter: Path, new_text: Path
) -> None:
    before = read_manifest(adapter)
    grow(adapter, new_text)
    with pytest.raises(AdapterError, match="entries, the manifest says") as said:
        read_memory(adapter, before)
    assert "run the same command again" in said.value.hint


def test_lists_of_the_small_models_keys_are_not_those_of_a_host(
    adapter: Path, new_text: Path, host: HFModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trimtab.store.index.LISTED_ENTRIES", 1_000)
    monkeypatch.setattr("trimtab.carriers.search.LISTED_ENTRIES", 1_000)
    seated(adapter, host)
    grow(adapter, new_text)
    used: list[object] = []

    def spied(memory: Memory, earlier: Sequence[tuple[Path, int]]) -> Listed | None:
        used.append(lists_before(memory, earlier))
        return lists_before(memory, earlier)

    monkeypatch.setattr("trimtab.store.index.lists_before", spied)
    seated(adapter, host)
    seated(adapter, host, host_keys=True)
    assert [found is not None for found in used] == [True, False]


def test_near_duplicates_of_test_files_are_left_out(adapter: Path, new_text: Path) -> None:
    test = new_text.parent / "test.txt"
    test.write_text((new_text / "even" / "22.txt").read_text().replace("⚓", "anchor"))
    grown = grow(adapter, new_text, against=(str(test),))
    assert (grown.documents, grown.left_out, grown.known) == (3, 1, 0)
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
    with pytest.raises(InputError, match="inside the adapter"):
        grow(adapter, new_text, out=adapter / "grown")
    foreign = tmp_path / "notes"
    foreign.mkdir()
    (foreign / "diary.txt").write_text("mine")
    with pytest.raises(InputError, match="would lose"):
        grow(adapter, new_text, out=foreign)
    assert read_manifest(adapter) == read_manifest(original)


def test_it_is_a_command(adapter: Path, new_text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["append", str(adapter), str(new_text), "--dtype", "float32"])
    assert ended.value.code == 0
    assert "4 documents with" in capsys.readouterr().out
    grown = read_memory(adapter, read_manifest(adapter)).memory
    assert len(documents_of(grown.text)[0]) == len(replace(grown).sources.names)  # pyright: ignore
