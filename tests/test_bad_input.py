"""Bad input through the real command line: a finding, a remedy, status 2, and nothing lost."""

import json
import math
import resource
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from safetensors import safe_open
from safetensors.torch import save_file
from saving import saved
from test_imports import ENVIRONMENT

from trimtab.cli import main
from trimtab.config import FitConfig, RecordConfig, TuneConfig
from trimtab.fit import fit
from trimtab.record import record
from trimtab.tune import tune

SMALL = "tiny:llama?hidden=32&layers=1"
WINDOW = ("--window-tokens", "32")


@dataclass(frozen=True)
class Work:
    """Folders of each stage, finished, on tiny models."""

    folder: Path
    text: Path
    base: Path
    expert: Path
    recording: Path
    adapter: Path


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Work:
    """All stages done once; the base is a folder, so that a test can change its files."""
    folder = tmp_path_factory.mktemp("finished")
    work = Work(folder, *(folder / name for name in ("text", "base", "expert", "rec", "adapter")))
    work.text.mkdir()
    for n in range(8):
        lines = (f"pub fn add{n}{i}(a: u32) u32 {{ return a + {n * i}; }}\n" for i in range(6))
        (work.text / f"{n}.zig").write_text("".join(lines))
    saved(SMALL, work.base)
    tune(
        TuneConfig(
            model=str(work.base), data=(str(work.text),), out=work.expert, window_tokens=32,
            validation_tokens=256, max_tokens=600, dtype="float32",
        )
    )  # fmt: skip
    record(
        RecordConfig(
            expert=work.expert, out=work.recording, general=(str(work.text),), dtype="float32"
        )
    )
    fit(FitConfig(recording=work.recording, out=work.adapter, rank=4, key_size=16, epochs=1))
    return work


@pytest.fixture
def work(finished: Work, tmp_path: Path) -> Work:
    """A copy whose adapter a test may harm."""
    shutil.copytree(finished.adapter, tmp_path / "adapter")
    return Work(tmp_path, *finished_paths(finished), tmp_path / "adapter")


def finished_paths(work: Work) -> tuple[Path, ...]:
    return (work.text, work.base, work.expert, work.recording)


def contents(folder: Path) -> dict[str, bytes]:
    paths = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def refusal(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    """What the command line says on standard error when it refuses, which it must."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        main([str(word) for word in words])
    shown = capsys.readouterr()
    check_refusal(end.value.code, shown.out, shown.err)
    return shown.err


def check_refusal(status: object, out: str, err: str) -> None:
    assert status == 2, err
    assert "error: " in err and "\n  hint: " in err
    assert "Traceback" not in err + out
    message, hint = err.partition("error: ")[2].split("\n  hint: ")
    assert len(message) > 10 and len(hint) > 10


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRIMTAB_HOME", str(tmp_path / "home"))


TEXTS: dict[str, tuple[str, bytes | None, str]] = {
    "missing": ("a.txt", None, "no file matches"),
    "empty": ("a.txt", b"", "a.txt is empty"),
    "blank": ("a.txt", b" \n\n", "a.txt is empty"),
    "latin-1": ("a.txt", "größer".encode("latin-1"), "a.txt is not UTF-8: byte 2 is 0xf6"),
    "binary": ("a.txt", b"\x7fELF\0\0", "a.txt is binary (byte 4 is zero)"),
    "broken line": (
        "a.jsonl",
        b'{"text": "x"}\n{"text": \n{"text": "y"}\n',
        "line 2 of {path} is not valid JSON",
    ),
    "line of latin-1": ("a.jsonl", b'{"text": "x"}\n{"text": "\xf6"}\n', "line 2 of {path} is not"),
    "line without text": ("a.jsonl", b'{"text": "x"}\n\n{"body": "y"}\n', "line 3 of {path} has"),
    "no object": ("a.jsonl", b"[1]\n", "line 1 of {path} is a JSON list"),
    "not Parquet": ("a.parquet", b"PAR1 and nothing else", "cannot be read as Parquet"),
    "short": ("a.txt", b"short", "tokens, expected at least"),
}


@pytest.mark.parametrize("case", TEXTS)
def test_text_that_tune_cannot_use(
    case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name, data, message = TEXTS[case]
    path, out = tmp_path / name, tmp_path / "expert"
    if data is not None:
        path.write_bytes(data)
    said = refusal(capsys, "tune", path, "--model", SMALL, "--out", out, "--held-out", 0, *WINDOW)
    assert message.format(path=path) in said
    assert data is None or path.read_bytes() == data
    assert not out.exists(), "a refusal leaves no unfinished run"
    # The same folder serves once the text is mended.
    mended = tmp_path / "mended.txt"
    mended.write_text("pub fn main() void {}\n" * 20)
    words = ("--model", SMALL, "--out", out, "--held-out", 0, "--max-tokens", 64, *WINDOW)
    assert succeeded("tune", mended, *words)


def succeeded(*words: object) -> bool:
    with pytest.raises(SystemExit) as end:
        main([str(word) for word in words])
    return not end.value.code


@pytest.mark.parametrize("case", TEXTS)
def test_text_that_record_and_evaluate_cannot_use(
    case: str, work: Work, capsys: pytest.CaptureFixture[str]
) -> None:
    name, data, message = TEXTS[case]
    path, out = work.folder / name, work.folder / "out"
    if data is not None:
        path.write_bytes(b"x" if case == "short" else data)
    before = contents(work.expert) | contents(work.adapter)
    said = refusal(capsys, "record", work.expert, "--data", path, "--out", out)
    assert message.format(path=path) in said
    evaluating = ("evaluate", work.adapter, SMALL, "--data", path, "--out", work.folder / "report")
    message = "has no document of" if case == "short" else message.format(path=path)
    assert message in refusal(capsys, *evaluating)
    general = (*evaluating[:3], "--data", work.text, "--general", f"kind={path}", *evaluating[5:])
    assert message in refusal(capsys, *general)
    assert contents(work.expert) | contents(work.adapter) == before
    assert not (work.folder / "report").exists()


MODELS = {
    "tiny:none": "there is no toy model 'none'",
    "tiny:llama?hidden=9": "asks for width 9",
    "tiny:llama?colour=1": "has the setting colour='1'",
    "{folder}/none": "there is no file or folder",
    "{folder}/none.gguf": "there is no file or folder",
    "{folder}/notes.txt": "is a file, but not a GGUF file",
    "{folder}/broken.gguf": "broken.gguf",
    "{folder}/empty": "has no config.json",
    "{folder}/no-weights": "has no weights (*.safetensors",
    "{folder}/no-tokenizer": "has no tokenizer that can be read: there is no tokenizer.json",
    "{folder}/cut-off": "cut-off cannot be opened",
    "{folder}/half": "lacks 1 of its weights",
}


@pytest.fixture(scope="module")
def models(finished: Work) -> Path:
    folder = finished.folder / "models"
    for name in ("no-weights", "no-tokenizer", "cut-off", "half"):
        shutil.copytree(finished.base, folder / name)
    (folder / "empty").mkdir()
    (folder / "notes.txt").write_text("text")
    (folder / "broken.gguf").write_bytes(b"GGUF" + bytes(40))
    (folder / "no-weights" / "model.safetensors").unlink()
    for path in (folder / "no-tokenizer").glob("*token*"):
        path.unlink()
    weights = folder / "cut-off" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with safe_open(folder / "half" / "model.safetensors", framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in sorted(file.keys())[1:]}
    save_file(tensors, folder / "half" / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("ref", MODELS)
def test_models_that_cannot_be_opened(
    ref: str, models: Path, work: Work, capsys: pytest.CaptureFixture[str]
) -> None:
    model = ref.format(folder=models)
    out = work.folder / "out"
    before = contents(work.adapter) | contents(models)
    commands: list[tuple[object, ...]] = [
        ("tune", work.text, "--model", model, "--out", out),
        ("mount", work.adapter, model),
        ("generate", "pub fn", "--host", model, "--adapter", work.adapter),
        ("evaluate", work.adapter, model, "--data", work.text, "--out", out),
    ]
    for words in commands:
        assert MODELS[ref] in refusal(capsys, *words)
    assert contents(work.adapter) | contents(models) == before


def no_answer() -> socket.socket:
    """A server that takes connections and never says anything."""
    server = socket.socket()
    server.bind(("127.0.0.1", 0))
    server.listen()
    return server


@pytest.mark.parametrize("silent", [False, True])
def test_no_network(
    silent: bool, work: Work, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trimtab.backends.hub.CONNECT_SEC", 0.5)
    with no_answer() as server:
        port = server.getsockname()[1]
        if not silent:
            server.close()
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{port}")
        started = time.monotonic()
        said = refusal(
            capsys, "tune", work.text, "--model", "someone/model", "--out", work.folder / "out"
        )
        assert time.monotonic() - started < 10
    assert "someone/model is not a folder here, and the hub cannot be reached" in said
    assert "local folder, a GGUF file, or tiny:llama" in said


def test_offline_mode_answers_at_once(tmp_path: Path) -> None:
    environment = ENVIRONMENT | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    words = ("mount", "adapter", "someone/model")
    done = subprocess.run(
        [sys.executable, "-m", "trimtab", *words],
        capture_output=True, text=True, check=False, env=environment, timeout=60,
    )  # fmt: skip
    check_refusal(done.returncode, done.stdout, done.stderr)


def change_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


HARM: dict[str, tuple[Callable[[Path], None], str]] = {
    "head byte": (lambda f: change_byte(f / "head.safetensors"), "head.safetensors has changed"),
    "mount byte": (lambda f: change_byte(f / "mount.safetensors"), "mount.safetensors has changed"),
    "memory byte": (
        lambda f: change_byte(f / "memory" / "memory.safetensors"),
        "memory/memory.safetensors has changed",
    ),
    "expert byte": (
        lambda f: change_byte(f / "expert" / "adapter_model.safetensors"),
        "expert/adapter_model.safetensors has changed",
    ),
    "card byte": (lambda f: change_byte(f / "README.md"), "README.md has changed"),
    "file gone": (lambda f: (f / "head.safetensors").unlink(), "head.safetensors is missing"),
    "file too many": (lambda f: (f / "more.json").write_text("{}"), "not listed in manifest.json"),
    "version": (lambda f: edit(f / "manifest.json", format_version=2), "found format version 2"),
    "key": (lambda f: edit(f / "manifest.json", colour="red"), "unknown key 'colour'"),
    "format": (lambda f: edit(f / "manifest.json", format="zip"), "found format 'zip'"),
    "not JSON": (lambda f: (f / "manifest.json").write_text("{"), "is not valid JSON"),
    "no manifest": (lambda f: (f / "manifest.json").unlink(), "so it is no adapter"),
    "no folder": (lambda f: shutil.rmtree(f), "so it is no adapter"),
}


@pytest.mark.parametrize("harm", HARM)
def test_adapters_that_cannot_be_trusted(
    harm: str, work: Work, capsys: pytest.CaptureFixture[str]
) -> None:
    do, message = HARM[harm]
    report = work.folder / "report"
    # A seat from before the harm must not hide it.
    assert succeeded("mount", work.adapter, SMALL)
    do(work.adapter)
    commands: list[tuple[object, ...]] = [
        ("show", work.adapter),
        ("mount", work.adapter, SMALL),
        ("generate", "pub fn", "--host", SMALL, "--adapter", work.adapter),
        ("evaluate", work.adapter, SMALL, "--data", work.text, "--out", report),
    ]
    for words in commands:
        assert message in refusal(capsys, *words)
    assert not report.exists()


STAGES: dict[str, tuple[str, str, str, str]] = {
    "expert": ("expert.json", "lora/adapter_model.safetensors", "record", "version"),
    "recording": ("recording.json", "train-00000.safetensors", "fit", "format_version"),
}


@pytest.mark.parametrize("stage", STAGES)
def test_experts_and_recordings_that_cannot_be_trusted(
    stage: str, work: Work, capsys: pytest.CaptureFixture[str]
) -> None:
    name, payload, verb, version = STAGES[stage]
    folder = work.folder / stage
    out = work.folder / "out"
    harms: list[tuple[Callable[[], None], str]] = [
        (lambda: change_byte(folder / payload), "was changed"),
        (lambda: (folder / payload).unlink(), payload),
        (lambda: edit(folder / name, **{version: 99}), "format version 99"),
        (lambda: edit(folder / name, colour="red"), "colour: unknown key"),
        (lambda: (folder / name).write_text("{"), "is not valid JSON"),
        (lambda: (folder / name).unlink(), name),
    ]
    for harm, message in harms:
        shutil.copytree(getattr(work, stage), folder)
        harm()
        assert message in refusal(capsys, verb, folder, "--out", out)
        shutil.rmtree(folder)
    assert not (out / "manifest.json").exists()


def test_an_adapter_whose_small_model_has_another_tokenizer(
    work: Work, capsys: pytest.CaptureFixture[str]
) -> None:
    aside = work.folder / "aside"
    shutil.move(work.base, aside)
    saved(f"{SMALL}&vocab=bpe", work.base)
    before = contents(work.adapter) | contents(work.recording)
    report, out = work.folder / "report", work.folder / "out"
    commands: list[tuple[object, ...]] = [
        ("record", work.expert, "--out", out),
        ("fit", work.recording, "--out", out),
        ("generate", "a", "--host", SMALL, "--adapter", work.adapter, "--carriers", "expert"),
        ("evaluate", work.adapter, SMALL, "--data", work.text, "--out", report),
    ]
    try:
        for words in commands:
            said = refusal(capsys, *words)
            assert "fingerprint differs" in said or "the vocabulary of" in said
    finally:
        shutil.rmtree(work.base)
        shutil.move(aside, work.base)
    assert contents(work.adapter) | contents(work.recording) == before
    assert not (out / "manifest.json").exists() and not report.exists()
    # Head and memory need no small model at all.
    assert succeeded("mount", work.adapter, f"{SMALL}&vocab=bpe")


def with_file_limit(limit: int, act: Callable[[], str]) -> str:
    """Run where no file can grow beyond a size, as on a disk that fills up."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        return act()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("limit", [100, 3_000, 20_000])
def test_a_full_disk(limit: int, work: Work, capsys: pytest.CaptureFixture[str]) -> None:
    out, recorded, adapter = (work.folder / name for name in ("expert", "recording", "made"))
    tuning = ("tune", work.text, "--model", SMALL, "--out", out, "--max-tokens", 300, *WINDOW)
    tuning = (*tuning, "--checkpoint-every-sec", 0)
    recording = ("record", work.expert, "--out", recorded, "--general", work.text)
    fitting = ("fit", work.recording, "--out", adapter, "--rank", 4, "--epochs", 1)
    before = contents(work.expert) | contents(work.recording)
    for words, marker in (
        (tuning, out / "expert.json"),
        (recording, recorded / "recording.json"),
        (fitting, adapter / "manifest.json"),
    ):
        said = with_file_limit(limit, lambda words=words: refusal(capsys, *words))
        assert "cannot write" in said and "free space" in said
        assert not marker.exists()
        assert succeeded(*words) and marker.exists()
    assert contents(work.expert) | contents(work.recording) == before
    assert succeeded("show", adapter)


def test_a_full_disk_loses_no_finished_report(
    work: Work, capsys: pytest.CaptureFixture[str]
) -> None:
    report = work.folder / "report"
    words = ("evaluate", work.adapter, SMALL, "--data", work.text / "0.zig", "--out", report)
    assert succeeded(*words, "--rows", "host")
    before = contents(report)
    said = with_file_limit(500, lambda: refusal(capsys, *words, "--rows", "host"))
    assert "free space" in said and contents(report) == before


def test_a_prompt_that_is_no_text(work: Work, capsys: pytest.CaptureFixture[str]) -> None:
    # What a shell's bytes that are not UTF-8 become in Python's arguments.
    said = refusal(capsys, "generate", "\udcff broken", "--host", SMALL, "--adapter", work.adapter)
    assert "prompt 1 is not UTF-8" in said


def test_a_place_that_is_a_file(work: Work, capsys: pytest.CaptureFixture[str]) -> None:
    taken = work.folder / "notes.txt"
    taken.write_text("years of work")
    for words in (
        ("tune", work.text, "--model", SMALL, "--out", taken),
        ("record", work.expert, "--out", taken),
        ("fit", work.recording, "--out", taken),
        ("evaluate", work.adapter, SMALL, "--data", work.text, "--out", taken),
    ):
        assert "notes.txt" in refusal(capsys, *words)
    assert taken.read_text() == "years of work"


def test_a_folder_with_other_things_is_left_alone(
    work: Work, capsys: pytest.CaptureFixture[str]
) -> None:
    mine = work.folder / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("years of work")
    for words in (
        ("tune", work.text, "--model", SMALL, "--out", mine),
        ("record", work.expert, "--out", mine),
        ("fit", work.recording, "--out", mine),
        ("evaluate", work.adapter, SMALL, "--data", work.text, "--out", mine),
    ):
        refusal(capsys, *words)
        assert contents(mine) == {"thesis.txt": b"years of work"}


@pytest.fixture
def broken_base(work: Work) -> Iterator[Path]:
    """The small model with a weight that is not a number, under the same fingerprint."""
    path = work.base / "model.safetensors"
    whole = path.read_bytes()
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}
    name = next(name for name in tensors if name.endswith("mlp.down_proj.weight"))
    tensors[name][0, 0] = math.nan
    save_file(tensors, path, metadata={"format": "pt"})
    yield work.base
    path.write_bytes(whole)


def test_numbers_that_are_not_finite(
    broken_base: Path, work: Work, capsys: pytest.CaptureFixture[str]
) -> None:
    out, report = work.folder / "out", work.folder / "report"
    before = contents(work.adapter)
    commands: list[tuple[object, ...]] = [
        ("tune", work.text, "--model", broken_base, "--out", out / "1", *WINDOW),
        ("record", work.expert, "--out", out / "2"),
        ("mount", work.adapter, broken_base),
        ("generate", "pub fn", "--host", broken_base, "--adapter", work.adapter),
        ("evaluate", work.adapter, broken_base, "--data", work.text, "--out", report),
    ]
    for words in commands:
        said = refusal(capsys, *words)
        assert "logits that are not finite numbers" in said
    assert contents(work.adapter) == before and not report.exists()


def test_a_loss_that_is_not_finite_keeps_the_checkpoint(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, text, out = (tmp_path / name for name in ("base", "text", "expert"))
    saved("tiny:gpt2?hidden=32&layers=1", base)
    with safe_open(base / "model.safetensors", framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}
    tensors["transformer.wpe.weight"][30] = math.inf
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    text.mkdir()
    for n in range(20):
        (text / f"{n}.txt").write_text("a text of 24 characters.")
    # Only this one reaches the position that is broken.
    (text / "long.txt").write_text("a text of more than thirty characters.")
    words = ("tune", text, "--model", base, "--out", out, "--held-out", 0, *WINDOW)
    words = (*words, "--checkpoint-every-sec", 0, "--batch-windows", 1, "--seed", 1)
    said = refusal(capsys, *words)
    assert "the loss or its gradient is not a finite number at step" in said
    assert "--learning-rate" in said
    checkpoint = out / "checkpoint" / "state.safetensors"
    with safe_open(checkpoint, framework="pt") as state:
        assert json.loads(state.metadata()["state"])["step"] > 0
    assert not (out / "expert.json").exists()
