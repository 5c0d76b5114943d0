import errno
import inspect
import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import typer
from rich.console import Console
from test_imports import ENVIRONMENT
from test_manifest import full_manifest, payload

from trimtab import config
from trimtab.cli import main
from trimtab.cli_errors import reported
from trimtab.cli_summaries import OF_HOSTS, VERBS
from trimtab.cli_verbs import CONFIGS, configured, stream, words_of
from trimtab.errors import InputError
from trimtab.progress import Display
from trimtab.store.card import write_adapter

STOPPED = "stopped; the same command goes on from what was saved, if anything was\n"


def run(*words: str) -> int:
    """Exit status of a command line, run in this process."""
    with pytest.raises(SystemExit) as end:
        main(words)
    return end.value.code if isinstance(end.value.code, int) else 0


@pytest.mark.parametrize("verb", CONFIGS)
def test_help_names_every_field(
    verb: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert run(*words_of(verb).split(), "--help") == 0
    shown = capsys.readouterr().out
    for name, field in CONFIGS[verb].model_fields.items():
        assert name.upper() in shown or f"--{name.replace('_', '-')}" in shown
        words = (field.description or "").split()
        assert len(words) > 1 and words[0] in shown and words[1] in shown


def test_a_verb_in_brief_is_what_it_is_in_full() -> None:
    assert {**VERBS, **OF_HOSTS}.keys() == CONFIGS.keys()
    for verb, summary in {**VERBS, **OF_HOSTS}.items():
        whole = inspect.cleandoc(CONFIGS[verb].__doc__ or "")
        assert summary == " ".join(whole.split("\n\n")[0].split())


def test_brackets_in_help_are_no_markup(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    run("mount", "--help")
    assert "hub name[@revision]" in capsys.readouterr().out


def given(verb: str, **values: object) -> config.Config:
    return configured(verb, {"config": None, **values})


def test_options_become_the_configuration() -> None:
    made = given("tune", data=["a.txt", "b,c.txt"], model="tiny:llama", out=Path("x"), rank=None)
    assert made == config.TuneConfig(
        data=("a.txt", "b,c.txt"), model="tiny:llama", out=Path("x"), rank=16
    )


@pytest.mark.parametrize("words", [["head,memory"], ["head", "memory"], ["head, memory"]])
def test_closed_lists_take_commas_and_repetition(words: list[str]) -> None:
    made = given("fit", recording=Path("r"), out=Path("o"), carriers=words)
    assert isinstance(made, config.FitConfig) and made.carriers == ("head", "memory")


@pytest.mark.parametrize("suffix", ["toml", "json"])
def test_a_config_file_yields_to_options(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"fit.{suffix}"
    text = 'out = "o"\nrank = 8\nepochs = 2\ncarriers = ["head"]\n'
    as_json = json.dumps({"out": "o", "rank": 8, "epochs": 2, "carriers": ["head"]})
    path.write_text(text if suffix == "toml" else as_json)
    made = configured("fit", {"config": path, "recording": Path("r"), "rank": 4})
    assert made == config.FitConfig(
        recording=Path("r"), out=Path("o"), rank=4, epochs=2, carriers=("head",)
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("colour = 1", "gives 'colour', which `trimtab fit` does not have"),
        ("rank = ", "cannot be read"),
        (None, "No such file"),
        ('rank = "many"', "--rank: .*found 'many'"),
    ],
)
def test_bad_config_files(tmp_path: Path, content: str | None, message: str) -> None:
    path = tmp_path / "fit.toml"
    if content is not None:
        path.write_text(content)
    with pytest.raises(InputError, match=message):
        configured("fit", {"config": path, "recording": Path("r"), "out": Path("o")})


def test_a_json_list_is_no_configuration(tmp_path: Path) -> None:
    path = tmp_path / "fit.json"
    path.write_text("[]")
    with pytest.raises(InputError, match="no table"):
        configured("fit", {"config": path})


def test_wrong_values_name_their_options(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("tune", "--model", "tiny:llama", "--window-tokens", "3", "--rank", "0") == 2
    shown = capsys.readouterr().err
    assert "DATA is needed" in shown and "--out is needed" in shown
    assert "--window-tokens: Input should be greater than or equal to 8 (found 3)" in shown
    assert "hint: see `trimtab tune --help`" in shown and "Traceback" not in shown


def test_wrong_carriers_and_rules_over_several_fields(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("fit", "r", "--out", "o", "--carriers", "head,hat") == 2
    assert "--carriers: Input should be 'head', 'memory' or 'expert' (found 'hat')" in (
        capsys.readouterr().err
    )
    assert run("record", "e", "--out", "o", "--window-tokens", "16") == 2
    assert "stride_tokens must be at most window_tokens" in capsys.readouterr().err
    for targets in ("labels", "blend"):
        assert run("fit", "r", "--out", "o", "--targets", targets) == 2
        shown = capsys.readouterr().err
        assert f"targets {targets} are for a head that is fitted on a host (--host)" in shown
        assert "a head on the small model follows the expert" in shown
    tuning = ("tune", "a.txt", "--model", "tiny:llama", "--out", "o", "--eaft-alpha")
    assert run(*tuning, "2") == 2
    assert "eaft_alpha has an effect with loss eaft only" in capsys.readouterr().err
    for alpha, rule in (("-0.5", "greater than or equal to 0"), ("inf", "a finite number")):
        assert run(*tuning, alpha, "--loss", "eaft") == 2
        assert f"--eaft-alpha: Input should be {rule}" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words",
    [("nonsense",), ("tune", "--nonsense"), ("tune", "--rank", "x"), ("tune", "--method", "x")],
)
def test_what_typer_refuses(words: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*words) == 2
    assert capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (InputError("found 1", hint="give 2"), 2, "error: found 1\n  hint: give 2\n"),
        (OSError(errno.ENOSPC, "No space left on device"), 2, "free space on that disk"),
        (RuntimeError("io: No space left on device (os error 28)"), 2, "free space on that disk"),
        (FileNotFoundError(2, "No such file", "x.txt"), 2, "cannot use x.txt: No such file"),
        (MemoryError(), 2, "not enough memory"),
        (KeyboardInterrupt(), 130, STOPPED),
        (KeyError("x\ny"), 1, "unexpected error: KeyError: "),
        (RuntimeError(), 1, "TRIMTAB_DEBUG=1"),
    ],
)  # fmt: skip
def test_errors_are_words_and_a_status(
    error: BaseException, status: int, message: str, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.delenv("TRIMTAB_DEBUG", raising=False)
    with pytest.raises(typer.Exit) as end, reported():
        raise error
    assert end.value.exit_code == status
    shown = capsys.readouterr().err
    assert message in shown and "Traceback" not in shown
    monkeypatch.setenv("TRIMTAB_DEBUG", "1")
    with pytest.raises(typer.Exit), reported():
        raise error
    assert "Traceback" in capsys.readouterr().err


def test_show_and_list(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TRIMTAB_HOME", str(tmp_path / "home"))
    write_adapter(payload(tmp_path / "zig.adapter"), full_manifest())
    assert run("show", "zig.adapter") == 0
    shown = capsys.readouterr().out
    assert "Contains training text" in shown and "beside them, to be mounted with: " in shown
    assert "live blend     host^0.5 expert^1 reference^-0.5, also with the memory\n" in shown
    assert run("show", "zig.adapter", "--json") == 0
    assert json.loads(capsys.readouterr().out)["format"] == "trimtab-adapter"
    assert run("list") == 0
    assert "zig.adapter" in capsys.readouterr().out
    (tmp_path / "zig.adapter" / "head.safetensors").write_bytes(b"bad!")
    assert run("show", "zig.adapter") == 2
    assert "head.safetensors has changed" in capsys.readouterr().err


def test_one_continuation_is_streamed_and_several_are_kept_apart(
    capsys: pytest.CaptureFixture[str],
) -> None:
    def continuing(settings, *, progress, on_text, on_note) -> None:
        on_note("beside the text")
        with progress("generating", 4) as advance:
            for index, text in [(0, "a"), (1, "x"), (0, "b"), (1, "y")]:
                if index < len(settings.prompt):
                    on_text(index, text)
                advance(1)

    def noted(_: config.GenerateConfig, **given: Any) -> None:
        given["on_text"](0, "no line")
        written.append(capsys.readouterr().out)
        given["on_note"]("used 1 call")
        written.append(capsys.readouterr().out)

    written = list[str]()
    one = config.GenerateConfig(host="h", prompt=("p",))
    stream(continuing, one, Display())
    assert capsys.readouterr() == ("ab\n", "beside the text\n")
    # What is said after the text does not stand behind its last line.
    stream(noted, one, Display())
    assert (written, capsys.readouterr().out) == (["no line", "\n"], "")
    stream(continuing, one.model_copy(update={"prompt": ("p", "q")}), Display())
    assert capsys.readouterr().out == "== 1 of 2\nab\n== 2 of 2\nxy\n"


def test_bars_nest_and_leave() -> None:
    stream = io.StringIO()
    display = Display(Console(file=stream, force_terminal=True, width=100))
    with display.progress("tuning [x]", 4) as advance:
        advance(2)
        with display.progress("validating", 0) as inner:
            inner(1)
        advance(2)
    assert "tuning [x]" in stream.getvalue() and "4/4" in stream.getvalue()
    with pytest.raises(RuntimeError), display.progress("recording", 2):
        raise RuntimeError
    with display.progress("generating", 2):
        display.hush()
        written = len(stream.getvalue())
        with display.progress("more", 1) as advance:
            advance(1)
    assert len(stream.getvalue()) == written


def test_what_has_no_units_is_shown_by_its_time() -> None:
    stream, now = io.StringIO(), [0.0]
    display = Display(Console(file=stream, width=40), clock=lambda: now[0])
    with display.waiting("loading"), display.progress("opening a model", 0):
        now[0] = 7.0
    assert stream.getvalue() == "opening a model: 7 s\n"
    terminal = Display(Console(file=stream, force_terminal=True, width=100))
    with terminal.waiting("loading [x]"):
        pass
    with terminal.progress("opening", 0):
        pass
    assert "loading [x]" in stream.getvalue() and "0/?" not in stream.getvalue()


def test_a_log_gets_few_lines() -> None:
    stream, now = io.StringIO(), [0.0]
    display = Display(Console(file=stream, width=40), clock=lambda: now[0])
    with display.progress("tuning", 1000) as advance:
        for _ in range(100):
            now[0] += 1
            advance(10)
    lines = stream.getvalue().splitlines()
    assert lines[0] == "tuning: 150 of 1,000 (15%), about 85 s left"
    assert lines[-1] == "tuning: 1,000 done in 100 s"
    assert len(lines) == 7


def test_what_an_earlier_run_has_done_says_nothing_of_the_pace() -> None:
    stream, now = io.StringIO(), [0.0]
    display = Display(Console(file=stream, width=60), clock=lambda: now[0])
    with display.progress("tuning", 1000) as advance:
        for _ in range(5):
            advance(100)
        for _ in range(50):
            now[0] += 1
            advance(10)
    lines = stream.getvalue().splitlines()
    assert lines[0] == "tuning: 650 of 1,000 (65%), about 35 s left"
    stream.truncate(0)
    with display.progress("tuning", 1000) as advance:
        advance(500)
        now[0] += 20
        advance(0)
    assert "tuning: 500 of 1,000 (50%)\n" in stream.getvalue()


def test_ctrl_c_ends_with_130() -> None:
    program = (
        "import signal, time\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from trimtab.cli import command_line\nfrom trimtab.cli_errors import reported\n"
        "app = command_line([])\n"
        "@app.command('wait')\ndef wait() -> None:\n with reported():\n"
        "  print('ready', flush=True)\n  time.sleep(30)\n"
        "app(['wait'])"
    )
    words, pipe = [sys.executable, "-c", program], subprocess.PIPE
    with subprocess.Popen(words, stdout=pipe, stderr=pipe, text=True, env=ENVIRONMENT) as process:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        _, shown = process.communicate(timeout=10)
    assert process.returncode == 130
    assert shown == STOPPED


def test_a_reader_that_leaves_is_no_error(tmp_path: Path) -> None:
    read_end, write_end = os.pipe()
    os.close(read_end)
    done = subprocess.run(
        [sys.executable, "-m", "trimtab", "list"],
        stdout=write_end, stderr=subprocess.PIPE, text=True, check=False, cwd=tmp_path,
        env=ENVIRONMENT,
    )  # fmt: skip
    os.close(write_end)
    assert done.stderr == "" and done.returncode == 1


def test_a_verb_runs_and_prints_its_summary(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("".join(f"const a{i}: i32 = {i};\n" for i in range(100)))
    words = ("--model", "tiny:llama?hidden=32&layers=1", "--out", str(tmp_path / "expert"))
    assert run("tune", str(text), *words, "--window-tokens", "64", "--max-tokens", "512") == 0
    shown = capsys.readouterr()
    assert "bits per byte" in shown.out and "Traceback" not in shown.err
    assert run("tune", str(tmp_path / "none.txt"), *words) == 2
    assert "error: no file matches" in capsys.readouterr().err


def test_a_library_that_wraps_ctrl_c_does_not_hide_it(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(typer.Exit) as end, reported():
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt as stop:
            raise ImportError("cannot import the rest") from stop
    assert end.value.exit_code == 130
    assert capsys.readouterr().err == STOPPED
