import json
import os
from datetime import UTC, datetime
from pathlib import Path

import pytest

from trimtab.errors import AdapterError, NumericalError
from trimtab.show import describe_list, show
from trimtab.store.adapter_schema import Earlier
from trimtab.store.card import readable_bytes, render_card, write_adapter
from trimtab.store.local import adapters_home, list_adapters
from trimtab.store.manifest import (
    AdapterManifest,
    BaseModelReference,
    Blend,
    ExpertCarrier,
    Gate,
    HeadCarrier,
    Licences,
    MemoryCarrier,
    Provenance,
    read_manifest,
    write_manifest,
)

GOLDEN = Path(__file__).parent / "golden" / "adapter_v1_manifest.json"
BASE = BaseModelReference(
    ref="tiny:llama", vocabulary_sha256="a" * 64, unembedding_sha256="b" * 64, hidden=64
)


def full_manifest() -> AdapterManifest:
    return AdapterManifest(
        name="zig",
        created=datetime(2026, 2, 3, 4, 5, 6, 789, tzinfo=UTC),
        base_model=BASE,
        carriers={
            "head": HeadCarrier(rank=4, hidden=64),
            "memory": MemoryCarrier(
                entries=3,
                key_size=8,
                gate=Gate(features=("cosine", "constant"), weights=(0.1, -2.0)),
                own_gate=Gate(features=("cosine",), weights=(0.2,)),
                bytes_gate=Gate(features=("constant",), weights=(-1.0,)),
                grown_from=(Earlier(sha256="d" * 64, entries=2),),
            ),
            "expert": ExpertCarrier(rank=2),
        },
        blend=Blend(live={"blend": (0.5, 1.0, 0.5)}, live_with_memory=("blend",), share=0.01),
        metrics={"held_out_nats": 1.25},
        licences=Licences(adapter="Apache-2.0", data="MIT", models="Apache-2.0"),
        provenance=Provenance(
            fit={"rank": 4, "out": "zig.adapter"},
            packages={"torch": "2.13"},
            inputs={"recording": "c" * 64},
            tokens=1234,
        ),
    )


def payload(folder: Path) -> Path:
    for path, content in {
        "head.safetensors": b"head",
        "mount.safetensors": b"mount",
        "memory/keys.safetensors": b"keys",
        "memory/values.parquet": b"values",
        "expert/adapter_config.json": b"{}",
        "expert/adapter_model.safetensors": b"lora",
    }.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(content)
    return folder


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    folder = payload(tmp_path / "zig.adapter")
    write_adapter(folder, full_manifest())
    return folder


def edited(folder: Path, **changes: object) -> Path:
    path = folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return folder


def test_exact_bytes_of_a_manifest(tmp_path: Path) -> None:
    folder = payload(tmp_path / "zig.adapter")
    write_manifest(folder, full_manifest())
    written = (folder / "manifest.json").read_bytes()
    assert written == GOLDEN.read_bytes()


def test_writing_what_was_read_changes_nothing(adapter: Path) -> None:
    before = (adapter / "manifest.json").read_bytes()
    again = write_manifest(adapter, read_manifest(adapter))
    assert (adapter / "manifest.json").read_bytes() == before
    assert again == read_manifest(adapter)


def test_typed_carriers(adapter: Path) -> None:
    manifest = read_manifest(adapter)
    assert manifest.head is not None and manifest.head.files == ("head.safetensors",)
    assert manifest.memory is not None and manifest.memory.gate.weights == (0.1, -2.0)
    assert manifest.expert is not None and manifest.expert.rank == 2
    assert manifest.contains_text
    assert manifest.bytes_of("memory") == len(b"keys") + len(b"values")
    assert set(manifest.files) == {
        path.relative_to(adapter).as_posix()
        for path in adapter.rglob("*")
        if path.is_file() and path.name != "manifest.json"
    }


def test_one_changed_byte_in_any_file_is_found(adapter: Path) -> None:
    for path in read_manifest(adapter).files:
        content = bytearray((adapter / path).read_bytes())
        content[0] ^= 1
        (adapter / path).write_bytes(content)
        with pytest.raises(AdapterError, match=f"{path} has changed"):
            read_manifest(adapter)
        content[0] ^= 1
        (adapter / path).write_bytes(content)
    read_manifest(adapter)


def test_verify_off_reads_the_manifest_alone(adapter: Path) -> None:
    (adapter / "head.safetensors").write_bytes(b"else")
    assert read_manifest(adapter, verify=False).name == "zig"


def test_missing_file(adapter: Path) -> None:
    (adapter / "memory" / "keys.safetensors").unlink()
    with pytest.raises(AdapterError, match=r"memory/keys.safetensors is missing"):
        read_manifest(adapter)


def test_unlisted_file(adapter: Path) -> None:
    (adapter / "expert" / "extra.safetensors").write_bytes(b"x")
    with pytest.raises(AdapterError, match=r"not listed .* expert/extra.safetensors"):
        read_manifest(adapter)


def test_hidden_files_are_passed_over(adapter: Path) -> None:
    (adapter / ".lock").write_bytes(b"")
    (adapter / ".git").mkdir()
    (adapter / ".git" / "config").write_bytes(b"")
    assert ".lock" not in read_manifest(adapter).files


@pytest.mark.parametrize("directory", [False, True])
def test_links_are_refused(adapter: Path, tmp_path: Path, directory: bool) -> None:
    if directory:
        (adapter / "memory").rename(tmp_path / "outside")
        (adapter / "memory").symlink_to(tmp_path / "outside")
    else:
        (adapter / "head.safetensors").rename(tmp_path / "outside")
        (adapter / "head.safetensors").symlink_to(tmp_path / "outside")
    with pytest.raises(AdapterError, match="is a link"):
        read_manifest(adapter)


def test_a_link_as_manifest_is_refused(adapter: Path, tmp_path: Path) -> None:
    (adapter / "manifest.json").rename(tmp_path / "m.json")
    (adapter / "manifest.json").symlink_to(tmp_path / "m.json")
    with pytest.raises(AdapterError, match="is a link"):
        read_manifest(adapter)


def test_a_pipe_is_refused(adapter: Path) -> None:
    os.mkfifo(adapter / "pipe.json")
    with pytest.raises(AdapterError, match="a link or a device"):
        read_manifest(adapter)


@pytest.mark.parametrize(
    "path",
    [
        "../outside.json",
        "/outside.json",
        "memory/../../outside.json",
        "memory\\keys.json",
        "C:x.json",
        "memory//keys.json",
        "./head.json",
        "",
        "manifest.json",
        ".hidden.json",
        "expert/adapter_model.bin",
        "expert/model.pkl",
        "setup.py",
    ],
)
def test_paths_that_a_manifest_must_not_name(adapter: Path, path: str) -> None:
    files = json.loads((adapter / "manifest.json").read_text())["files"]
    edited(adapter, files=files | {path: {"sha256": "0" * 64, "bytes": 1}})
    with pytest.raises(AdapterError, match="files"):
        read_manifest(adapter, verify=False)


def test_newer_version(adapter: Path) -> None:
    with pytest.raises(AdapterError, match=r"format version 2.*reads up to 1") as caught:
        read_manifest(edited(adapter, format_version=2, anything=1))
    assert "upgrade" in caught.value.hint


@pytest.mark.parametrize("version", [0, True, "1", 1.0, None])
def test_versions_that_never_were(adapter: Path, version: object) -> None:
    with pytest.raises(AdapterError, match="format_version"):
        read_manifest(edited(adapter, format_version=version))


def test_unknown_key(adapter: Path) -> None:
    with pytest.raises(AdapterError, match="unknown key 'colour'"):
        read_manifest(edited(adapter, colour="red"))


def test_unknown_key_of_a_carrier(adapter: Path) -> None:
    carriers = json.loads((adapter / "manifest.json").read_text())["carriers"]
    carriers["head"]["colour"] = "red"
    with pytest.raises(AdapterError, match=r"unknown key 'carriers.head.head.colour'"):
        read_manifest(edited(adapter, carriers=carriers))


def test_a_memory_cannot_deny_its_text(adapter: Path) -> None:
    carriers = json.loads((adapter / "manifest.json").read_text())["carriers"]
    carriers["memory"]["contains_text"] = False
    with pytest.raises(AdapterError, match="contains_text"):
        read_manifest(edited(adapter, carriers=carriers))


def test_text_is_not_a_number(adapter: Path) -> None:
    carriers = json.loads((adapter / "manifest.json").read_text())["carriers"]
    carriers["head"]["rank"] = "4"
    with pytest.raises(AdapterError, match="rank"):
        read_manifest(edited(adapter, carriers=carriers))


@pytest.mark.parametrize(
    "content", ["", "[]", '{"a": 1, "a": 2}', '{"a": NaN}', "\x00", "[" * 9999]
)
def test_no_json(adapter: Path, content: str) -> None:
    (adapter / "manifest.json").write_text(content)
    with pytest.raises(AdapterError):
        read_manifest(adapter)


def test_another_format(adapter: Path) -> None:
    with pytest.raises(AdapterError, match="found format 'trimtab-recording'"):
        read_manifest(edited(adapter, format="trimtab-recording"))


def test_no_adapter_at_all(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match=r"has no manifest.json"):
        read_manifest(tmp_path)
    with pytest.raises(AdapterError, match="is no folder"):
        read_manifest(tmp_path / "nowhere")


def test_a_carrier_needs_its_payload(tmp_path: Path) -> None:
    folder = payload(tmp_path)
    (folder / "head.safetensors").unlink()
    with pytest.raises(AdapterError, match=r"carrier 'head' but 'head.safetensors' is not there"):
        write_manifest(folder, full_manifest())
    assert not (folder / "manifest.json").exists()


def test_text_of_an_unnamed_memory_is_not_taken_along(tmp_path: Path) -> None:
    manifest = full_manifest().model_copy(
        update={"carriers": {"head": HeadCarrier(rank=4, hidden=64)}}
    )
    with pytest.raises(AdapterError, match="has no carrier"):
        write_manifest(payload(tmp_path), manifest)


def test_code_is_not_taken_along(tmp_path: Path) -> None:
    (payload(tmp_path) / "expert" / "model.py").write_bytes(b"")
    with pytest.raises(AdapterError, match="no data format"):
        write_manifest(tmp_path, full_manifest())


def test_numbers_that_json_has_not(tmp_path: Path) -> None:
    manifest = full_manifest().model_copy(update={"metrics": {"loss": float("nan")}})
    with pytest.raises(NumericalError):
        write_manifest(payload(tmp_path), manifest)


def test_a_gate_has_one_weight_a_feature() -> None:
    with pytest.raises(ValueError, match="2 features but 1 weights"):
        Gate(features=("a", "b"), weights=(1.0,))


def test_the_card_says_what_can_be_read_back(adapter: Path) -> None:
    card = (adapter / "README.md").read_text()
    front = card.split("---\n")[1]
    assert "library_name: trimtab\n" in front
    assert "base_model" not in front, "no hub has a model of this name"
    assert 'license: "Apache-2.0"\n' in front
    assert "- contains-training-text\n" in front
    assert "**Contains training text.**" in card
    assert "| memory | entries 3, key_size 8, values hard | 10 B | **yes** |" in card
    assert "does not lie as `tiny:llama`, name its place with `--small`" in card


def test_the_card_names_a_model_of_the_hub_as_hubs_read_it(adapter: Path) -> None:
    base = BASE.model_copy(update={"ref": "small/model@main", "revision": "0a1b"})
    metrics = {"held out": {"bits": 1.25, "bytes": [1, 2]}}
    update = {"base_model": base, "metrics": metrics}
    write_adapter(adapter, full_manifest().model_copy(update=update))
    card = (adapter / "README.md").read_text()
    assert 'base_model: "small/model"\nbase_model_relation: adapter\n' in card.split("---\n")[1]
    assert "| held out bits | 1.25 |\n| held out bytes | 1, 2 |\n" in card


def test_the_card_of_a_head_claims_no_text(tmp_path: Path) -> None:
    (tmp_path / "head.safetensors").write_bytes(b"head")
    carriers = {"head": HeadCarrier(rank=4, hidden=64)}
    manifest = AdapterManifest(name="zig", base_model=BASE, carriers=carriers)
    card = render_card(write_adapter(tmp_path, manifest))
    assert "contains-training-text" not in card and "memory" not in card
    assert "--small" not in card


def test_values_of_strangers_stay_in_their_line(adapter: Path) -> None:
    strange = full_manifest().model_copy(
        update={"licences": Licences(adapter='x"\nlicense: mit', data="a\n# b")}
    )
    write_adapter(adapter, strange)
    lines = (adapter / "README.md").read_text().splitlines()
    assert "license: mit" not in lines and "# b" not in lines


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1 kB"), (12_345, "12.3 kB"), (999_700, "1 MB")],
)
def test_readable_bytes(count: int, text: str) -> None:
    assert readable_bytes(count) == text


def test_show_checks_and_describes(adapter: Path) -> None:
    text = show(adapter).summary()
    for part in ("zig", "tiny:llama", "memory: 10 B, entries 3", "Contains training text", "1.25"):
        assert part in text


def test_show_keeps_control_characters_from_the_terminal(adapter: Path) -> None:
    update = {"licences": Licences(data="\x1b[2Jgone")}
    write_adapter(adapter, full_manifest().model_copy(update=update))
    assert "\x1b" not in show(adapter).summary()


def test_list_finds_installed_and_nearby_adapters(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRIMTAB_HOME", str(tmp_path / "home"))
    assert list_adapters(here=tmp_path) == []
    assert "no adapters" in describe_list([])
    for folder in (adapters_home() / "one", tmp_path / "a/b/two", tmp_path / "a/b/c/d/too-deep"):
        write_adapter(payload(folder), full_manifest())
    (tmp_path / "broken.adapter").mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "manifest.json").write_text('{"format": "web app"}')
    found = list_adapters(here=tmp_path)
    assert [item.folder.name for item in found] == ["one", "two", "broken.adapter"]
    assert [item.manifest is not None for item in found] == [True, True, False]
    text = describe_list(found)
    assert "head,memory,expert" in text and "cannot read" in text
