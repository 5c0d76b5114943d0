"""Setting up: refusals before anything is downloaded, and pins that agree with the project."""

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from tools import set_up

ROOT = Path(__file__).parents[1]


VLLM = set_up.CONSTRAINTS_OF["vllm"]


def pins(path: Path = set_up.CONSTRAINTS) -> dict[str, str]:
    lines = [line for line in path.read_text().splitlines() if line[0] != "#"]
    return dict(line.split("==") for line in lines)


def requirements(path: Path) -> list[str]:
    """What is installed with some constraints; vLLM itself only where there is a GPU."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    chosen = {"vllm-test"} if path == VLLM else extras.keys() - {"vllm", "vllm-test"}
    groups = [project["dependencies"], *(extras[name] for name in sorted(chosen))]
    return [requirement for group in groups for requirement in group]


def version_of(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", text))


@pytest.mark.parametrize("path", [set_up.CONSTRAINTS, VLLM], ids=lambda path: path.name)
def test_every_requirement_is_pinned_within_its_bounds(path: Path) -> None:
    found = pins(path)
    for requirement in requirements(path):
        match = re.fullmatch(r"([\w-]+)(?:\[[\w,]+\])?>=([\d.]+)(?:,<([\d.]+))?", requirement)
        if match is None:
            # An extra that takes in others.
            assert re.fullmatch(r"trimtab\[[\w,]+\]", requirement), requirement
            continue
        name, least, below = match.groups()
        pinned = found.get(name) or found[name.replace("-", "_")]
        assert version_of(pinned) >= version_of(least), requirement
        assert below is None or version_of(pinned) < version_of(below), requirement


@pytest.mark.parametrize("path", [set_up.CONSTRAINTS, VLLM], ids=lambda path: path.name)
def test_no_pin_asks_for_one_build_of_torch(path: Path) -> None:
    assert re.fullmatch(r"[\d.]+", pins(path)["torch"]) and pins(path)["torch"] == pins()["torch"]


def test_an_old_python_is_refused_with_a_remedy() -> None:
    with pytest.raises(SystemExit, match=r"needs Python 3\.11 or newer; .* is 3\.9\n  hint: name"):
        set_up.check_python((3, 9))
    set_up.check_python((3, 12))


def test_an_environment_of_another_python_is_seen(tmp_path: Path) -> None:
    assert not set_up.made_by_another_python(tmp_path)
    own = ".".join(map(str, sys.version_info[:3]))
    for version, other in ((own, False), ("3.9.1", True), ("", True)):
        (tmp_path / "pyvenv.cfg").write_text(f"home = /usr/bin\nversion = {version}\n")
        assert set_up.made_by_another_python(tmp_path) is other


@pytest.mark.parametrize(("index", "gpu"), [("any", False), ("", True), ("URL", True)])
def test_cuda_is_downloaded_where_it_is_wanted(index, gpu) -> None:
    set_up.check_build(14, index, gpu=gpu)


@pytest.mark.parametrize("index", ["", "URL"])
def test_cuda_is_not_downloaded_without_a_gpu(index) -> None:
    set_up.check_build(0, index, gpu=False)
    with pytest.raises(SystemExit, match=r"14 CUDA packages.*\n.*TORCH_INDEX=URL"):
        set_up.check_build(14, index, gpu=False)


def test_cuda_packages_are_told_from_others() -> None:
    names = ["torch", "nvidia-cudnn-cu13", "cuda-toolkit", "sympy", "nvidia-nccl-cu13"]
    assert set_up.cuda_packages(names) == ["nvidia-cudnn-cu13", "cuda-toolkit", "nvidia-nccl-cu13"]


def test_the_index_is_given_to_torch_alone() -> None:
    pins = set_up.constraints_of("demo")
    assert set_up.torch_source("URL", pins) == ["--index-url", "URL"]
    held = ["-c", str(set_up.CONSTRAINTS)]
    assert set_up.torch_source("", pins) == set_up.torch_source("any", pins) == held


def make(*words: str) -> str:
    done = subprocess.run(
        ["make", "-n", *words], cwd=ROOT, capture_output=True, text=True, env={**os.environ}
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_make_passes_the_models_and_the_index_on(tmp_path: Path) -> None:
    said = make("demo", f"VENV={tmp_path}", "SMALL=a b.gguf", "HOST=c d", "TORCH_INDEX=URL")
    assert '--torch-index "URL"' in said
    assert '-m examples.demo --small "a b.gguf" --host c d' in said


def test_a_ready_environment_is_not_set_up_again(tmp_path: Path) -> None:
    (tmp_path / "ready-demo").touch()
    assert "set_up.py" not in make("demo", f"VENV={tmp_path}")
    assert "set_up.py" in make("test", f"VENV={tmp_path}")


def test_ci_runs_tests_format_lint_and_types() -> None:
    script = (ROOT / ".ci" / "run").read_text()
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
    assert re.findall(r"^make (\w+)$", script, re.MULTILINE) == ["test", "check"]
    checks = make("check")
    assert all(word in checks for word in ("ruff format --check", "ruff check", "pyright"))
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert settings["tool"]["pyright"]["typeCheckingMode"] == "strict"


PIP_SAYS = """Looking in indexes: https://example.org/simple
Collecting torch
  Downloading torch-2.13.0-cp311.whl (190.1 MB)
Progress 0 of 190100000
Progress 95050000 of 190100000
Collecting idna
  Downloading idna-3.20-py3-none-any.whl (69 kB)
Requirement already satisfied: numpy
Building wheels for collected packages: llama-cpp-python
  Building wheel for llama-cpp-python (pyproject.toml): still running...
Installing collected packages: idna, torch
Successfully installed idna-3.20 torch-2.13.0
"""
"""What pip prints with set_up.PIP_TELLS, shortened."""


def test_a_log_of_the_set_up_has_large_downloads_and_builds() -> None:
    found = "".join(set_up.told(PIP_SAYS.splitlines(), 0))
    assert found == (
        "  torch-2.13.0-cp311.whl (190.1 MB)\n"
        "  Building wheel for llama-cpp-python (pyproject.toml): still running...\n"
        "  2 packages installed\n"
    )


def test_a_terminal_sees_how_far_a_download_is() -> None:
    found = "".join(set_up.told(PIP_SAYS.splitlines(), 80))
    lines = [line.rpartition(set_up.ERASED)[2] for line in found.split("\n")]
    assert lines[-2:] == ["  2 packages installed", ""]
    assert "  95 of 190 MB  torch-2.13.0-cp311.whl" in found.split(set_up.ERASED)
    narrow = "".join(set_up.told(PIP_SAYS.splitlines(), 20)).split(set_up.ERASED)
    assert "  95 of 190 MB  tor" in narrow
    unknown = list(set_up.told(["Progress 3000000 of 0\n"], 80))
    assert unknown == [f"{set_up.ERASED}  3 MB  ", set_up.ERASED]


def test_a_set_up_that_fails_shows_what_pip_said(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").write_text(
        "#!/bin/sh\necho The conflict is caused by: this\necho Progress 1 of 2\n"
        "echo $PIP_PROGRESS_BAR\nexit 3\n"
    )
    (tmp_path / "bin" / "python").chmod(0o755)
    for tells, shown in ((set_up.PIP_TELLS, "raw"), ({}, "")):
        with pytest.raises(SystemExit, match="pip install failed; its message stands above"):
            set_up.pip(tmp_path, "install", "anything", tells=tells)
        lines = capfd.readouterr().out.splitlines()
        assert lines == ["The conflict is caused by: this", shown]


def test_a_python_s_first_pip_is_not_asked_for_its_progress(tmp_path: Path) -> None:
    """An old pip ends with an error where it is asked to print numbers."""
    asked = list[dict[str, str]]()

    def pip(_: Path, *words: str, tells: dict[str, str] = set_up.PIP_TELLS) -> None:
        asked.append(tells)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(set_up, "pip", pip)
        patch.setattr(set_up, "create", lambda _: tmp_path.mkdir(exist_ok=True))
        patch.setattr(set_up, "install_torch", lambda *_: None)
        patch.setattr(sys, "argv", ["set_up", "demo", "--venv", str(tmp_path)])
        set_up.main()
    assert asked == [{}, set_up.PIP_TELLS]


def test_pip_tells_its_progress_as_the_set_up_reads_it(tmp_path: Path) -> None:
    """The real pip: what it prints of a package that it builds and installs here."""
    (tmp_path / "pyproject.toml").write_text("[project]\nname = 'nothing'\nversion = '1'\n")
    words = ("-m", "pip", "install", "--no-index", "--no-build-isolation", "--target")
    command = [sys.executable, *words, str(tmp_path / "there"), str(tmp_path)]
    environment = {**os.environ, **set_up.PIP_TELLS}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert "".join(set_up.told(done.stdout.splitlines(), 0)) == "  1 packages installed\n"
