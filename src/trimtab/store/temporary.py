"""Folders beside what is to be written, until it is whole; what ended runs left is cleared away."""

import errno
import fcntl
import os
import re
import secrets
import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Literal

Role = Literal["tmp", "old"]
"""What a folder beside another is: its next content, or its last."""

# Older versions wrote a dash among the digits.
_OWNER = r"\d+-[0-9a-f]{8}-?[0-9a-f]{8}"
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}
_TEMPORARY = re.compile(rf"\..+\.tmp-{_OWNER}")


@contextmanager
def temporary_folder(target: Path) -> Iterator[Path]:
    """Make a folder beside a path, hold it, and remove it unless it has another name by then."""
    with ExitStack() as ending:
        while True:
            folder = beside(target, "tmp")
            # Twice: Ctrl-C may break off one removal, as it may the making.
            for _ in range(2):
                ending.callback(shutil.rmtree, folder, ignore_errors=True)
            folder.mkdir()
            # Until it is held, another run may take it for a leftover.
            if ending.enter_context(held(folder, fcntl.LOCK_SH)):
                break
        yield folder


def beside(target: Path, role: Role) -> Path:
    """A new hidden name beside a path."""
    return target.with_name(f".{target.name}.{role}-{os.getpid()}-{secrets.token_hex(8)}")


def all_beside(target: Path, role: Role) -> list[Path]:
    """What lies beside a path under names of `beside`, whoever made it."""
    name = re.compile(re.escape(f".{target.name}.{role}-") + _OWNER)
    return sorted(entry for entry in target.parent.iterdir() if name.fullmatch(entry.name))


def is_temporary(entry: Path) -> bool:
    """Whether a name is one of `beside` for the next content of any path."""
    return _TEMPORARY.fullmatch(entry.name) is not None


def remove_abandoned(entries: Sequence[Path]) -> None:
    """Remove those folders that nobody holds."""
    for entry in entries:
        # What another user has left may not be ours to open.
        with suppress(OSError), held(entry, fcntl.LOCK_EX) as is_abandoned:
            if is_abandoned:
                shutil.rmtree(entry, ignore_errors=True)


@contextmanager
def held(folder: Path, kind: int) -> Iterator[bool]:
    """Hold a folder: together with others who use it, or alone to clear it away.

    A hold ends with its process, and is seen by all of a machine, also in other containers, where
    process ids say nothing. Where a file system has no locks, nothing is cleared away.

    Args:
        folder: The folder, which may be gone.
        kind: LOCK_SH to use it, LOCK_EX to clear it away.

    Yields:
        Whether it is held: not if others hold it in the other way, or it is gone.

    Raises:
        OSError: It cannot be opened or held for another reason.
    """
    with ExitStack() as ending:
        is_held = False
        with suppress(FileNotFoundError, NotADirectoryError, BlockingIOError):
            descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
            ending.callback(os.close, descriptor)
            is_held = _take(descriptor, kind) and is_at(descriptor, folder)
        yield is_held


def _take(descriptor: int, kind: int) -> bool:
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _NO_LOCKS:
            return kind == fcntl.LOCK_SH
        raise
    return True


def is_at(descriptor: int, path: Path) -> bool:
    """Whether what was opened still lies at a path."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False
