"""Text that the demo has neither trained nor tested on, and what programs that ask for it take."""

import argparse
import importlib.util
from collections.abc import Sequence
from pathlib import Path

from examples.demo import corpus
from trimtab.text.duplicates import drop_near_duplicates
from trimtab.types import Document

GENERAL_MODULES = (
    *("mailbox", "gettext", "imaplib", "sched", "shlex", "plistlib", "netrc", "cmd"),
    *("pdb", "queue", "zipfile", "uuid", "poplib", "locale", "wave", "cProfile"),
)
"""Modules of Python's library that neither the demo nor the probe text uses."""


def arguments(doc: str | None) -> argparse.ArgumentParser:
    """A parser of the models, of Zig's files with those to leave out, and of the result.

    Args:
        doc: The program's docstring, whose first line describes it.
    """
    parser = argparse.ArgumentParser(description=(doc or "").split("\n")[0])
    parser.add_argument("--adapter", type=Path, required=True)
    parser.add_argument("--host", required=True)
    parser.add_argument("--small")
    parser.add_argument("--zig", type=Path, required=True)
    parser.add_argument("--leave-out", type=Path, nargs="*", default=[])
    parser.add_argument("--out", type=Path, required=True)
    return parser


def free_zig(folder: Path, left_out: Sequence[Path]) -> list[Document]:
    """Whole files that nobody has trained on or tests on, unlike any of those, shuffled."""
    used = {p.relative_to(f).as_posix(): p for f in left_out for p in f.rglob("*.zig")}
    whole = corpus.choose(folder, corpus.Choice(test_files=10**6))["test"]
    free = [Document(name, text) for name, text in whole.items() if name not in used]
    against = [Document(name, path.read_text()) for name, path in used.items()]
    return [*drop_near_duplicates(free, against).kept]


def zig_documents(folder: Path, left_out: Sequence[Path]) -> list[Document]:
    """Middles of the free files that are long enough."""
    free = free_zig(folder, left_out)
    pieces = [Document(one.name, corpus.middle(one.text, 3_000)) for one in free]
    return [piece for piece in pieces if len(piece.text) > 1_000]


def python_documents() -> list[Document]:
    """Middles of modules of Python's library."""
    found = []
    for name in GENERAL_MODULES:
        spec = importlib.util.find_spec(name)
        assert spec and spec.origin
        text = Path(spec.origin).read_text(encoding="utf-8")
        found.append(Document(name, corpus.middle(text, 3_000)))
    return found


def prose_documents() -> list[Document]:
    """The demo's passages of Moby-Dick."""
    return [Document(path.name, path.read_text()) for path in sorted(corpus.PROSE.glob("*.txt"))]
