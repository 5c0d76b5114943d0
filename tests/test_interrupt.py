"""Ctrl-C and kill -9 at a real `trimtab`: the same command again ends as if nothing happened."""

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from children import started

from trimtab.cli import main
from trimtab.config import FitConfig, RecordConfig, TuneConfig
from trimtab.fit import UNFINISHED_NAME, fit
from trimtab.record import record
from trimtab.tune import tune

SMALL = "tiny:llama?hidden=32&layers=1"
STOPPED = "stopped; the same command goes on from what was saved, if anything was\n"


@dataclass(frozen=True)
class Stage:
    """A verb at work.

    Attributes:
        words: Its command line without --out.
        marker: File that the verb writes last.
        begun: Tells from the output folder that the work is under way.
        whole: What an uninterrupted run leaves, but for files that name the folder.
    """

    words: tuple[str, ...]
    marker: str
    begun: Callable[[Path], bool]
    whole: dict[str, bytes]


@pytest.fixture(scope="module")
def stages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Stage]:
    folder = tmp_path_factory.mktemp("whole")
    text = folder / "text"
    text.mkdir()
    for n in range(12):
        lines = (f"pub fn add{n}{i}(a: u32) u32 {{ return a + {n * i}; }}\n" for i in range(12))
        (text / f"{n}.zig").write_text("".join(lines))
    expert, recording, adapter = (folder / name for name in ("expert", "recording", "adapter"))
    general = str(text / "1.zig")
    tuning = TuneConfig(
        model=SMALL, data=(str(text),), out=expert, window_tokens=32, batch_windows=1,
        dtype="float32",
    )  # fmt: skip
    eaft = tuning.model_copy(update={"out": folder / "eaft", "loss": "eaft"})
    tune(tuning)
    tune(eaft)
    record(
        RecordConfig(
            expert=expert, out=recording, general=(general,), dtype="float32", window_tokens=32,
            stride_tokens=16, shard_tokens=256,
        )
    )  # fmt: skip
    fit(FitConfig(recording=recording, out=adapter, rank=4, key_size=16))
    tune_words = (
        "tune", str(text), "--model", SMALL, "--window-tokens", "32", "--batch-windows", "1",
        "--dtype", "float32", "--checkpoint-every-sec", "0",
    )  # fmt: skip
    fit_words = (
        "fit", str(recording), "--rank", "4", "--key-size", "16", "--checkpoint-every-sec", "0",
    )  # fmt: skip
    return {
        "tune": Stage(tune_words, "expert.json", saved, contents(expert, "expert.json")),
        "tune eaft": Stage(
            (*tune_words, "--loss", "eaft"),
            "expert.json",
            saved,
            contents(eaft.out, "expert.json"),
        ),
        "record": Stage(
            ("record", str(expert), "--general", general, "--dtype", "float32",
             "--window-tokens", "32", "--stride-tokens", "16", "--shard-tokens", "256"),
            "recording.json",
            lambda out: len(list(out.glob("*.safetensors"))) > 2,
            contents(recording, "recording.json"),
        ),
        "fit": Stage(
            fit_words,
            "manifest.json",
            lambda out: (out / UNFINISHED_NAME).exists(),
            contents(adapter, "manifest.json"),
        ),
        "fit memory": Stage(
            fit_words, "manifest.json", head_is_done, contents(adapter, "manifest.json")
        ),
    }  # fmt: skip


def saved(out: Path) -> bool:
    """Whether tune has written a checkpoint."""
    return (out / "checkpoint" / "state.safetensors").exists()


def head_is_done(out: Path) -> bool:
    """Whether fit has gone on to the memory: where it writes the adapter lies a whole head."""
    return any(out.parent.glob(f".{out.name}.tmp-*/head.safetensors"))


def contents(folder: Path, marker: str) -> dict[str, bytes]:
    """Every file but the one that names folders, or the time."""
    paths = (path for path in folder.rglob("*") if path.is_file())
    found = {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}
    return {name: data for name, data in found.items() if name not in (marker, "README.md")}


def run_in_process(words: list[str], shown: Path) -> None:
    """The command line, as the whole life of a process whose standard error goes to a file."""
    # Tests that run in the background have inherited that Ctrl-C means nothing.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    descriptor = os.open(shown, os.O_WRONLY | os.O_CREAT)
    for stream in (sys.stdout, sys.stderr):
        os.dup2(descriptor, stream.fileno())
    main(words)


def interrupted(stage: Stage, out: Path, stop: signal.Signals) -> tuple[int | None, str]:
    """Run a verb in a process of its own and stop it as soon as its work is under way."""
    shown = out.parent / "shown.txt"
    process = started(run_in_process, [*stage.words, "--out", str(out)], shown)
    deadline = time.monotonic() + 60
    while not stage.begun(out) and process.is_alive() and time.monotonic() < deadline:
        time.sleep(0.001)
    assert process.pid is not None
    os.kill(process.pid, stop)
    process.join(30)
    said = shown.read_text()
    shown.unlink()
    return process.exitcode, said


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGKILL])
@pytest.mark.parametrize("name", ["tune", "tune eaft", "record", "fit", "fit memory"])
def test_the_same_command_again_finishes(
    name: str, stop: signal.Signals, stages: dict[str, Stage], tmp_path: Path
) -> None:
    stage, out = stages[name], tmp_path / "out"
    status, shown = interrupted(stage, out, stop)
    assert status == (130 if stop == signal.SIGINT else -stop)
    assert "Traceback" not in shown
    if stop == signal.SIGINT:
        assert shown.endswith(STOPPED)
    assert not (out / stage.marker).exists()
    if name == "fit memory" and stop == signal.SIGKILL:
        [written] = tmp_path.glob(".out.tmp-*")
        assert (written / "head.safetensors").read_bytes() == stage.whole["head.safetensors"]
        assert not (written / "memory" / "memory.safetensors").exists()
    if name.startswith("fit"):
        # No half adapter: what is there is to be continued, or was being written when it ended.
        left = {path.name for path in out.glob("*") if f"{UNFINISHED_NAME}.tmp-" not in path.name}
        assert left <= {".lock", UNFINISHED_NAME}
    # How often a verb saves changes no result, and takes time.
    rest = [] if name == "record" else ["--checkpoint-every-sec", "60"]
    with pytest.raises(SystemExit) as end:
        main([*stage.words, "--out", str(out), *rest])
    assert not end.value.code
    assert json.loads((out / stage.marker).read_text())
    assert contents(out, stage.marker) == stage.whole
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_the_loss_is_one_of_the_settings_that_change_the_expert(stages: dict[str, Stage]) -> None:
    weights = [stages[n].whole["lora/adapter_model.safetensors"] for n in ("tune", "tune eaft")]
    assert weights[0] != weights[1]


def test_ctrl_c_before_the_work_begins(stages: dict[str, Stage], tmp_path: Path) -> None:
    out = tmp_path / "out"
    early = Stage(stages["tune"].words, "expert.json", lambda out: out.exists(), {})
    status, shown = interrupted(early, out, signal.SIGINT)
    assert (status, shown) == (130, STOPPED)
