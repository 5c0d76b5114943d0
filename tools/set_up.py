"""Set up the project's own virtual environment; `make test` and `make demo` call it.

Needs nothing but Python: it runs before any package is there.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import deque
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CONSTRAINTS = ROOT / "constraints.txt"
OLDEST = (3, 11)
EXTRAS = {
    "demo": ("", 185, "numpy, pyarrow, transformers, faiss and their like"),
    "test": ("test", 230, "numpy, pyarrow, transformers, faiss, onnx and their like, pytest"),
    "llamacpp": ("test,llamacpp-test", 345, "the same, and llama.cpp, built here for up to 40 min"),
    "vllm": ("vllm-test", 900, "vLLM's CPU build and some 160 others, pytest"),
    "browser": ("test,browser", 280, "the same, with Playwright"),
    "clients": ("test,clients", 250, "the same, with litellm"),
    "load": ("load", 200, "numpy, pyarrow, transformers, faiss and their like, schemathesis"),
    "check": ("dev", 305, "the same, with ruff, pyright and the Node.js that pyright needs"),
}
CONSTRAINTS_OF = {"vllm": ROOT / "constraints-vllm.txt"}
"""Versions for purposes that cannot have those of CONSTRAINTS."""
CLASHING = {"vllm": ("torchvision", "torchaudio", "torchcodec")}
"""Packages that come along and are taken away again: the package registry's builds of them are for
another PyTorch, and what finds them fails."""
PIP_TELLS = {"PIP_PROGRESS_BAR": "raw"}
"""Settings with which pip prints how far a download is as lines of numbers."""
LARGE_MB = re.compile(r"\(\d{2,}\.\d MB\)")
ERASED = "\r\x1b[K"
"""Erases a line that was written in place."""
KEPT_LINES = 30
"""Lines of pip's that are shown where it fails."""
TORCH_MB = 190
TORCH_CUDA_MB = 2500
ANY_BUILD = "any"


def main() -> None:
    """Create or complete the environment for one purpose, and mark it as ready."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("purpose", choices=sorted(EXTRAS))
    parser.add_argument("--venv", type=Path, default=ROOT / ".venv")
    parser.add_argument("--torch-index", default="")
    given = parser.parse_args()
    check_python(sys.version_info[:2])
    folder = given.venv.resolve()
    say(f"making {folder}; downloads come from pip's package registry")
    create(folder)
    # An environment's first pip may be too old to tell its progress, and refuses to be asked to.
    pip(folder, "install", "--quiet", "--upgrade", f"pip=={pinned('pip')}", tells={})
    install_torch(folder, given.torch_index, constraints_of(given.purpose))
    install_rest(folder, given.purpose)
    (folder / f"ready-{given.purpose}").touch()


def check_python(version):
    """Stop with words if this Python is too old."""
    if version < OLDEST:
        wanted, found = (".".join(map(str, v)) for v in (OLDEST, version))
        stop(
            f"Trimtab needs Python {wanted} or newer; {sys.executable} is {found}",
            "name another one: make PYTHON=/path/to/python3.11 ...",
        )


def create(folder):
    """Make the environment, or complete one whose creation was interrupted."""
    options = ["--clear"] if made_by_another_python(folder) else []
    done = subprocess.run([sys.executable, "-m", "venv", *options, str(folder)])
    if done.returncode != 0:
        stop(
            f"the virtual environment {folder} cannot be created",
            "on Debian and Ubuntu install python3.11-venv; also check space and rights there",
        )


def made_by_another_python(folder):
    """Whether the environment there, if any, belongs to another version of Python."""
    settings = folder / "pyvenv.cfg"
    if not settings.is_file():
        return False
    lines = (line.partition("=") for line in settings.read_text(encoding="utf-8").splitlines())
    values = {key.strip(): value.strip() for key, _, value in lines}
    found = values.get("version", "").split(".")[:2]
    return found != [str(number) for number in sys.version_info[:2]]


def constraints_of(purpose):
    """The file of versions that a purpose is held to."""
    return CONSTRAINTS_OF.get(purpose, CONSTRAINTS)


def install_torch(folder, index, constraints):
    """Install PyTorch, but no CUDA on a machine without an NVIDIA GPU."""
    if is_installed(folder, "torch", pinned("torch")):
        return
    command = [f"torch=={pinned('torch')}", *torch_source(index, constraints)]
    cuda = cuda_packages(planned(folder, command))
    check_build(len(cuda), index, gpu=has_nvidia_gpu())
    size = f"more than {TORCH_CUDA_MB:,}" if cuda else f"about {TORCH_MB}"
    say(f"downloading PyTorch {pinned('torch')} ({'CUDA' if cuda else 'CPU'} build): {size} MB")
    pip(folder, "install", *command)


def torch_source(index, constraints):
    """Options of pip that say where PyTorch comes from, and which versions of what it needs.

    An index of PyTorch's own need not have the versions that the constraints want; what comes from
    there is exchanged afterwards.
    """
    own = index not in ("", ANY_BUILD)
    return ["--index-url", index] if own else ["-c", str(constraints)]


def cuda_packages(names):
    """Those of the packages that only a machine with an NVIDIA GPU needs."""
    return [name for name in names if name.startswith(("nvidia-", "cuda-"))]


def check_build(cuda_count, index, *, gpu):
    """Stop before gigabytes of CUDA are downloaded for nothing."""
    if cuda_count == 0 or gpu or index == ANY_BUILD:
        return
    stop(
        f"PyTorch from this registry is a CUDA build: it would bring {cuda_count} CUDA packages,"
        f" more than {TORCH_CUDA_MB:,} MB, and this machine shows no NVIDIA GPU",
        "give PyTorch's CPU index (README.md, 'Set-up'): make demo TORCH_INDEX=URL\n"
        f"  or take the CUDA build all the same: make demo TORCH_INDEX={ANY_BUILD}",
    )


def install_rest(folder, purpose):
    """Install the project, editable, and what this purpose needs."""
    extra, size_mb, what = EXTRAS[purpose]
    say(f"downloading what is missing of about {size_mb} MB of packages: {what}")
    project = f"{ROOT}[{extra}]" if extra else str(ROOT)
    pip(folder, "install", "-c", str(constraints_of(purpose)), "-e", project)
    if purpose in CLASHING:
        pip(folder, "uninstall", "--yes", *CLASHING[purpose])


def planned(folder, wanted):
    """Names of the packages that pip would install, without downloading them."""
    with tempfile.TemporaryDirectory() as scratch:
        report = Path(scratch) / "report.json"
        pip(folder, "install", "--quiet", "--dry-run", "--report", str(report), *wanted)
        installs = json.loads(report.read_text(encoding="utf-8"))["install"]
    return [item["metadata"]["name"].lower() for item in installs]


def is_installed(folder, package, version):
    """Whether the environment has this version, of whatever build."""
    command = f"from importlib.metadata import version; print(version({package!r}))"
    found = subprocess.run(
        [str(python_of(folder)), "-c", command], capture_output=True, text=True
    ).stdout.strip()
    return found.partition("+")[0] == version


def has_nvidia_gpu():
    """Whether this machine shows an NVIDIA GPU."""
    return Path("/dev/nvidia0").exists() or shutil.which("nvidia-smi") is not None


def pinned(package):
    """Version of a package in constraints.txt."""
    for line in CONSTRAINTS.read_text(encoding="utf-8").splitlines():
        name, _, version = line.partition("==")
        if name == package:
            return version
    raise KeyError(package)


def pip(folder, *words, tells=PIP_TELLS):
    """Run the environment's own pip, or stop with what to do."""
    command = [str(python_of(folder)), "-m", "pip", *words]
    environment = {**os.environ, "PIP_DISABLE_PIP_VERSION_CHECK": "1", **tells}
    options = {"stdout": subprocess.PIPE, "text": True, "errors": "replace"}
    columns = shutil.get_terminal_size().columns if sys.stdout.isatty() else 0
    last = deque(maxlen=KEPT_LINES)
    with subprocess.Popen(command, env=environment, **options) as running:
        for text in told(kept(running.stdout, last), columns):
            print(text, end="", flush=True)
    if running.returncode != 0:
        # What pip says of a conflict stands among its other lines.
        sys.stdout.writelines(last)
        stop(
            f"pip {words[0]} failed; its message stands above",
            "check the network, the package registry that pip is configured for, and the space"
            " on this disk, then run the same command again: it continues",
        )


def kept(lines, last):
    """The same lines; the last of them, but those of numbers, stay in `last`."""
    for line in lines:
        if not line.startswith("Progress "):
            last.append(line)
        yield line


def told(lines, columns):
    """What a user is told of pip's many lines.

    Args:
        lines: What pip prints with PIP_TELLS.
        columns: Of a terminal, on which one line is written again and again to tell how far each
            download is; 0 where this is none.

    Yields:
        Text to print: downloads, large ones alone where nothing is written again; builds, which
        can take long; what was installed.
    """
    name, erased = "", ERASED if columns else ""
    for line in lines:
        words = line.split()
        if words[:1] == ["Downloading"]:
            name, size = words[1].rpartition("/")[2], " ".join(words[2:])
            if not columns and LARGE_MB.search(size):
                yield f"  {name} {size}\n"
        elif columns and words[:1] == ["Progress"]:
            yield f"{erased}{progress(name, words)}"[: columns + len(erased) - 1]
        elif columns and words[:1] == ["Installing"]:
            yield f"{erased}  installing"
        elif line.rstrip().endswith("still running..."):
            yield f"{erased}  {line.strip()}\n"
        elif words[:2] == ["Successfully", "installed"]:
            yield f"{erased}  {len(words) - 2} packages installed\n"
    # What comes next, an error above all, is not written behind a download.
    yield erased


def progress(name, words):
    """How far a download is, of pip's line `Progress DONE of WHOLE`, which is 0 if not known."""
    done, whole = (int(word) / 1e6 for word in words[1::2])
    return f"  {done:,.0f}{f' of {whole:,.0f}' if whole else ''} MB  {name}"


def python_of(folder):
    """The environment's interpreter."""
    return folder / "bin" / "python"


def say(text):
    """Tell the user what happens next."""
    print(f"set-up: {text}", flush=True)


def stop(found, hint):
    """End with what was found and what to do."""
    sys.exit(f"set-up: {found}\n  hint: {hint}")


if __name__ == "__main__":
    main()
