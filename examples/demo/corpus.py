"""The demo's text: Zig's standard library, and general text that must be left alone."""

import hashlib
import importlib.util
import random
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from examples.demo.packages import SourceError, changed, copy_members, opened_wheel
from trimtab.store.files import replace_directory

ZIG_PACKAGE = "ziglang==0.17.1"
ZIG_DOWNLOAD_MB = 101
ZIG_LICENCE = "Zig 0.17.1, of which only the standard library's text is used: MIT"
ZIG_FILES = r"^ziglang/lib/std/.*\.zig$"
ZIG_SHA256 = "ff3742db2280cf4eb0018570bb26070be7b764b9ea3021d70ce17d6b55c52c4b"
"""Of the names and contents of the files, since the wheels of the platforms differ."""

INSTEAD = (
    "check the network and pip's registry; or run the six steps on your own text:"
    " trimtab tune --help"
)
PROSE = Path(__file__).parents[1] / "general" / "prose"
PYTHON_MODULES = (
    *("configparser", "contextlib", "dataclasses", "ftplib", "functools"),
    *("ipaddress", "optparse", "smtplib", "tarfile", "threading"),
)
"""Modules of Python's own library, other than those of the text that `record` uses as general."""

MIDDLE_SHARE = 0.45
"""Share of a file that lies before its middle piece."""

MARKER = ".complete"


@dataclass(frozen=True)
class Choice:
    """Which files are test and which are training text.

    Attributes:
        seed: Seed of the order in which files are taken.
        min_bytes: Smallest file.
        max_bytes: Largest file.
        max_digits: Largest share of digits: more is a table, not a program.
        test_files: Test files, taken first.
        train_bytes: Bytes of training text at most.
    """

    seed: int = 0
    min_bytes: int = 2_500
    max_bytes: int = 16_000
    max_digits: float = 0.15
    test_files: int = 24
    train_bytes: int = 150_000


@dataclass(frozen=True)
class HeldOutFunction:
    """A function of a test file that nobody has trained on.

    Attributes:
        name: File and function.
        prompt: The file up to and including the line of the function's signature.
        truth: The function's body.
    """

    name: str
    prompt: str
    truth: str


def fetch_zig(folder: Path) -> Path:
    """Fetch the text of Zig's standard library, unless it is there, and return its folder.

    Raises:
        SourceError: The package cannot be fetched, or its text is not the pinned one.
        StorageError: The disk is full or the folder cannot be written.
    """
    target = folder / ZIG_PACKAGE.replace("==", "-")
    if is_fetched(folder):
        return target
    folder.mkdir(parents=True, exist_ok=True)
    print(f"fetching {ZIG_PACKAGE}", file=sys.stderr)
    with opened_wheel(ZIG_PACKAGE, folder, instead=INSTEAD) as wheel:
        with replace_directory(target, marker=MARKER) as fresh:
            _unpack(wheel, fresh)
            found = sha256_of_tree(fresh)
            if found != ZIG_SHA256:
                raise changed(f"{ZIG_PACKAGE}: its text's sha256 is {found}, not {ZIG_SHA256}")
            (fresh / MARKER).touch()
    return target


def is_fetched(folder: Path) -> bool:
    """Whether the text lies there, whole and unchanged."""
    return sha256_of_tree(folder / ZIG_PACKAGE.replace("==", "-")) == ZIG_SHA256


def _unpack(wheel, folder: Path) -> None:
    root = folder.resolve()
    for name in wheel.namelist():
        if not re.search(ZIG_FILES, name):
            continue
        path = (root / name.removeprefix("ziglang/lib/")).resolve()
        if not path.is_relative_to(root):
            raise changed(f"{ZIG_PACKAGE} has a file outside its folder: {name}")
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as file:
            copy_members(wheel, f"^{re.escape(name)}$", lambda _, file=file: file)


def sha256_of_tree(folder: Path) -> str:
    """Fingerprint of the Zig files in a folder: names and contents, in order of the names."""
    digest = hashlib.sha256()
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.zig"))
    for name in names:
        content = hashlib.sha256((folder / name).read_bytes()).hexdigest()
        digest.update(f"{content}  {name}\n".encode())
    return digest.hexdigest()


def choose(folder: Path, choice: Choice) -> dict[str, dict[str, str]]:
    """Choose test and training files, whole files and never the same one.

    Args:
        folder: Folder of the Zig files.
        choice: The rule.

    Returns:
        Text by file name (relative, with `/`), under "test" and "train".
    """
    texts = {}
    for path in sorted(folder.rglob("*.zig"), key=lambda path: path.relative_to(folder).as_posix()):
        raw = path.read_bytes()
        if choice.min_bytes <= len(raw) <= choice.max_bytes and _is_program(raw, choice):
            texts[path.relative_to(folder).as_posix()] = raw.decode()
    names = list(texts)
    random.Random(choice.seed).shuffle(names)
    test, rest = names[: choice.test_files], names[choice.test_files :]
    train, room = [], choice.train_bytes
    for name in rest:
        size = len(texts[name].encode())
        if size <= room:
            train.append(name)
            room -= size
    return {
        "test": {name: texts[name] for name in test},
        "train": {name: texts[name] for name in train},
    }


def _is_program(raw: bytes, choice: Choice) -> bool:
    try:
        raw.decode()
    except UnicodeDecodeError:
        return False
    return sum(byte in b"0123456789" for byte in raw) < choice.max_digits * len(raw)


def middle(text: str, max_bytes: int | None = None) -> str:
    """Whole lines from the first line break after 45 % of a text on; "" if there are none.

    The beginnings of source files are alike (licence, imports), which suits a memory too well.

    Args:
        text: The text.
        max_bytes: Size of the piece at most, which then ends with a line.
    """
    raw = text.encode()
    start = raw.find(b"\n", int(len(raw) * MIDDLE_SHARE)) + 1
    piece = raw[start:] if max_bytes is None else raw[start : start + max_bytes]
    if start + len(piece) < len(raw):
        piece = piece[: piece.rfind(b"\n") + 1]
    return piece.decode() if start else ""


def general_texts(*, skip_chars: int = 1_500, chars: int = 2_400) -> dict[str, dict[str, str]]:
    """Text of other kinds: prose that comes with the demo, and Python's own library.

    Args:
        skip_chars: Characters at a module's start that are left out (licence, imports).
        chars: Characters of a module that are taken.

    Returns:
        Text by file name, under "prose" and "python".
    """
    prose = {path.name: path.read_text(encoding="utf-8") for path in sorted(PROSE.glob("*.txt"))}
    python = {}
    for name in PYTHON_MODULES:
        found = importlib.util.find_spec(name)
        if found is None or found.origin is None or not found.origin.endswith(".py"):
            raise SourceError(
                f"this Python ({sys.executable}) has no source of its module {name}",
                hint="use a Python that has its standard library as files",
            )
        text = Path(found.origin).read_text(encoding="utf-8")
        python[f"{name}.txt"] = text[skip_chars : skip_chars + chars]
    return {"prose": prose, "python": python}


def write_texts(folder: Path, texts: Mapping[str, str]) -> None:
    """Make a folder hold exactly these texts; an equal one is left as it is.

    Raises:
        InputError: Something else lies there.
        StorageError: The disk is full or the folder cannot be written.
    """
    found = {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name != MARKER
    }
    wanted = {name: text.encode() for name, text in texts.items()}
    if found == wanted and (folder / MARKER).is_file():
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    with replace_directory(folder, marker=MARKER) as fresh:
        for name, content in wanted.items():
            path = fresh / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        (fresh / MARKER).touch()


def held_out_functions(
    texts: Mapping[str, str],
    count: int,
    *,
    prompt_chars: tuple[int, int] = (300, 1_500),
    body_lines: tuple[int, int] = (3, 12),
) -> list[HeldOutFunction]:
    """Find documented public functions to complete, at most one a file.

    Args:
        texts: Text by file name, in the order in which files are looked through.
        count: How many at most.
        prompt_chars: Fewest characters before a body, and most of a prompt, which are whole lines.
        body_lines: Fewest and most lines of a body, its closing brace included.
    """
    found = []
    for name, text in texts.items():
        for match in re.finditer(r"^( *)///.*\n\1pub fn (\w+)\(.*\{\n", text, re.MULTILINE):
            closing = re.compile(rf"^{match[1]}\}}\n", re.MULTILINE).search(text, match.end())
            body = text[match.end() : closing.end()] if closing else ""
            fits = body_lines[0] <= body.count("\n") <= body_lines[1]
            if fits and match.end() >= prompt_chars[0]:
                prompt = _last_lines(text[: match.end()], prompt_chars[1])
                found.append(HeldOutFunction(f"{name}: {match[2]}", prompt, body))
                break
        if len(found) == count:
            break
    return found


def _last_lines(text: str, chars: int) -> str:
    """The last whole lines of a text, of so many characters at most."""
    if len(text) <= chars:
        return text
    return text[-chars:].partition("\n")[2]
