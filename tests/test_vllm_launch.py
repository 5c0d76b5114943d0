"""vLLM's own server, started by `trimtab serve --engine vllm`: with a program in its place."""

import json
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from test_generate import adapter as adapter  # a fixture
from test_imports import ENVIRONMENT

from trimtab.cli import main
from trimtab.vllm.hook import VARIABLE
from trimtab.vllm.settings import settings_in

PROGRAM = f"""#!{sys.executable}
import json, os, sys
print(json.dumps([sys.argv[1:], os.environ["{VARIABLE}"]]))
"""


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A `vllm` that says how it was called."""
    path = tmp_path / "bin" / "vllm"
    path.parent.mkdir()
    path.write_text(PROGRAM)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", str(path.parent))
    monkeypatch.setenv("TRIMTAB_HOME", str(tmp_path / "home"))
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    return path


def serving(*words: str) -> list[str]:
    return ["serve", "owner/host@v2", "--engine", "vllm", *words]


@pytest.mark.usefixtures("program")
def test_this_process_becomes_vllms_server(adapter: Path, tmp_path: Path) -> None:
    words = ["--adapter", f"sea={adapter.name}", "--carriers", "head", "--name", "big"]
    words += ["--port", "8123", "--slots", "4", "--context-tokens", "512", "--dtype", "bfloat16"]
    home = {"PATH": str(tmp_path / "bin"), "TRIMTAB_HOME": str(tmp_path / "home")}
    done = subprocess.run(
        [sys.executable, "-m", "trimtab", *serving(*words)],
        capture_output=True,
        text=True,
        check=True,
        cwd=adapter.parent,
        env=ENVIRONMENT | home,
    )
    called, file = json.loads(done.stdout)
    assert called[:2] == ["serve", "owner/host"]
    options = dict(zip(called[2::2], called[3::2], strict=True))
    assert options == {
        "--logits-processors": "trimtab.vllm:Steering",
        "--host": "127.0.0.1",
        "--port": "8123",
        "--max-num-seqs": "4",
        "--dtype": "bfloat16",
        "--revision": "v2",
        "--served-model-name": "big",
        "--max-model-len": "512",
    }
    settings = settings_in(file)
    assert settings.folders == {"sea": adapter.resolve()}
    assert settings.carriers == {"sea": ("head",)}


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--keys", "keys.json", "--queue", "9"], "keys, queue"),
        (["--carriers", "expert"], "carriers"),
        (["--address", "0.0.0.0"], "VLLM_API_KEY"),
    ],
)
@pytest.mark.usefixtures("program")
def test_what_vllm_cannot_do_is_refused_before_it_starts(
    words: list[str], told: str, adapter: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        main(serving("--adapter", f"sea={adapter}", *words))
    assert end.value.code == 2
    assert told in capsys.readouterr().err


@pytest.mark.usefixtures("program")
def test_a_server_without_adapters_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(serving())
    assert "--adapter NAME=FOLDER" in capsys.readouterr().err


def test_without_vllm_it_says_how_to_install_it(
    program: Path, adapter: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    program.unlink()
    with pytest.raises(SystemExit) as end:
        main(serving("--adapter", f"sea={adapter}"))
    assert end.value.code == 2
    assert "trimtab[vllm]" in capsys.readouterr().err
