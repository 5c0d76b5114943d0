"""What the expert learns, what the host continues, and enough text for a large memory."""

import os
import random
from collections.abc import Iterator, Mapping
from pathlib import Path

from bench.speed.rows import Text
from bench.transfer.domains import TEXTS
from examples.demo import corpus

TRAIN_BYTES, TEST_FILES = 80_000, 24
PYTHON_BYTES = (4_000, 40_000)
"""Smallest and largest module of Python's own library that is taken."""


def chosen(text: Text) -> Mapping[str, Mapping[str, str]]:
    """Test and training files, by name; never the same one.

    Raises:
        SourceError: Zig's standard library cannot be fetched.
    """
    if text == "zig":
        choice = corpus.Choice(train_bytes=TRAIN_BYTES, test_files=TEST_FILES)
        return corpus.choose(corpus.fetch_zig(TEXTS), choice)
    modules = _python()
    names = list(modules)
    random.Random(0).shuffle(names)
    train, size = {}, 0
    for name in names[TEST_FILES:]:
        if size + len(modules[name]) <= TRAIN_BYTES:
            train[name] = modules[name]
            size += len(modules[name])
    return {"test": {name: modules[name] for name in names[:TEST_FILES]}, "train": train}


def endless(text: Text) -> Iterator[tuple[str, str]]:
    """All files of a kind by name, over and over."""
    if text == "zig":
        root = corpus.fetch_zig(TEXTS)
        paths = sorted(root.rglob("*.zig"), key=lambda path: path.relative_to(root).as_posix())
        files = {path.relative_to(root).as_posix(): path for path in paths}
    else:
        files = _python_files()
    number = 0
    while files:
        number += 1
        for name, path in files.items():
            found = path.read_text(encoding="utf-8", errors="ignore")
            if found.strip():
                yield f"{number}/{name}", found


def _python_files() -> dict[str, Path]:
    return {path.name: path for path in sorted(Path(os.__file__).parent.glob("*.py"))}


def _python() -> dict[str, str]:
    texts = {
        name: path.read_text(encoding="utf-8", errors="ignore")
        for name, path in _python_files().items()
    }
    low, high = PYTHON_BYTES
    return {name: text for name, text in texts.items() if low <= len(text) <= high}
