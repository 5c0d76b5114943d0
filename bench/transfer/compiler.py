"""Zig functions completed by a host, and whether the compiler's parser accepts them."""

import re
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.transfer.splits import in_turn
from examples.demo import corpus
from examples.demo.packages import copy_members, opened_wheel
from trimtab.store.files import replace_directory

PROMPT_CHARS = 1_200
"""Of the file before a function's body, which the host reads."""

BODY_LINES, BODY_CHARS = (2, 14), 480
CHECK_SEC = 60

_HEADER = re.compile(r"^( *)(?:pub )?fn \w+\(.*\{\n", re.MULTILINE)


@dataclass(frozen=True)
class Function:
    """A function of a file.

    Attributes:
        before: The file up to and including the line that opens its body.
        body: Its body, without the line break and the brace that close it.
        end: These, with the function's own indentation.
        after: The file from the function's end on.
    """

    before: str
    body: str
    end: str
    after: str

    @property
    def prompt(self) -> str:
        """The last whole lines before the body."""
        if len(self.before) <= PROMPT_CHARS:
            return self.before
        tail = self.before[-PROMPT_CHARS:]
        return tail[tail.find("\n") + 1 :]

    def filled(self, body: str) -> str:
        """The file with another body, which ends where it first closes."""
        return f"{self.before}{body.partition(self.end)[0]}{self.end}{self.after}"


def functions(texts: Mapping[str, str], count: int, zig: Path) -> list[Function]:
    """Short functions of files that the compiler's parser accepts, spread over the files.

    Args:
        texts: Whole files by name.
        count: How many at most.
        zig: The compiler.
    """
    found = [list(functions_in(text)) for text in texts.values() if accepts(zig, text)]
    return in_turn(found)[:count]


def functions_in(text: str) -> Iterator[Function]:
    """The short functions of a file that have some text before them."""
    for match in _HEADER.finditer(text):
        closing = f"\n{match[1]}}}\n"
        end = text.find(closing, match.end() - 1)
        body = text[match.end() : end]
        fits = BODY_LINES[0] <= body.count("\n") + 1 <= BODY_LINES[1]
        if end > match.end() >= 200 and fits and len(body) <= BODY_CHARS:
            yield Function(text[: match.end()], body, closing, text[end + len(closing) :])


def accepts(zig: Path, text: str) -> bool:
    """Whether `zig ast-check` finds no error: syntax, unknown and unused names."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "checked.zig"
        path.write_text(text)
        command = [str(zig), "ast-check", str(path)]
        done = subprocess.run(command, capture_output=True, timeout=CHECK_SEC)
    return done.returncode == 0


def accepted(zig: Path, asked: Sequence[Function], bodies: Sequence[str]) -> list[bool]:
    """Whether the compiler's parser accepts each completed file."""
    return [accepts(zig, f.filled(body)) for f, body in zip(asked, bodies, strict=True)]


def fetch_compiler(cache: Path) -> Path:
    """The Zig compiler of the package whose text is the domain, unless it is there; its path.

    Raises:
        SourceError: The package cannot be fetched.
        StorageError: The disk is full or the folder cannot be written.
    """
    folder = cache / f"{corpus.ZIG_PACKAGE.replace('==', '-')}-compiler"
    if not (folder / corpus.MARKER).is_file():
        print(f"{corpus.ZIG_DOWNLOAD_MB} MB of {corpus.ZIG_PACKAGE}: its compiler will be run")
        with opened_wheel(corpus.ZIG_PACKAGE, cache, instead=corpus.INSTEAD) as wheel:
            with replace_directory(folder, marker=corpus.MARKER) as fresh:
                with (fresh / "zig").open("wb") as target:
                    copy_members(wheel, r"^ziglang/zig$", lambda _: target)
                (fresh / corpus.MARKER).touch()
        # Settling a folder gives all of its files the mode of text.
        (folder / "zig").chmod(0o755)
    return folder / "zig"
