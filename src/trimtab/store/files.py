"""Files that are whole or absent: atomic writes, fingerprints, and one writer per folder."""

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from importlib import metadata
from pathlib import Path
from typing import Any

from trimtab.errors import InputError, NumericalError, TrimtabError
from trimtab.store.storage_errors import storage_errors
from trimtab.store.temporary import (
    all_beside,
    beside,
    held,
    is_at,
    is_temporary,
    remove_abandoned,
    temporary_folder,
)

LOCK_NAME = ".lock"
"""File in an output folder that its one writer holds."""

_PACKAGES = ("trimtab", "torch", "transformers", "peft", "safetensors", "numpy")


@contextmanager
def writing_atomically(path: Path) -> Iterator[Path]:
    """Give a temporary path to write; on success it becomes the file, else nothing changes.

    The file is on disk (fsync), with the usual permissions, before it takes its name. Missing
    folders are made. What killed runs left behind for this path is removed first.

    Args:
        path: The file to write; a symbolic link is followed.

    Raises:
        StorageError: The disk is full or the path cannot be written.
    """
    target = Path(os.path.realpath(path))
    with storage_errors(path):
        target.parent.mkdir(parents=True, exist_ok=True)
        remove_abandoned(all_beside(target, "tmp"))
        # A folder, because some libraries (safetensors) put temporary files beside the file.
        with temporary_folder(target) as folder:
            yield folder / target.name
            _settle(folder)
            os.replace(folder / target.name, target)
        _sync(target.parent)


def write_atomic(path: Path, data: bytes) -> None:
    """Write a file so that a reader sees the old content or the new, never a part.

    Raises:
        StorageError: The disk is full or the path cannot be written.
    """
    with writing_atomically(path) as temp:
        temp.write_bytes(data)


@contextmanager
def replace_directory(
    path: Path, *, marker: str = "manifest.json", unfinished: Collection[str] = ()
) -> Iterator[Path]:
    """Give a temporary folder to fill; on success it takes the place of the folder at path.

    The old folder stays until the new one is on disk. A kill between the two renames leaves
    the old one aside under a hidden name; the next use of the same path puts it back.

    Args:
        path: The folder to write; a symbolic link is followed.
        marker: File that tells a folder of ours, which may be replaced, from a user's own.
        unfinished: Entries that a writer who was interrupted may have left without it.

    Raises:
        InputError: There is a folder at path that holds other things, or a file.
        StorageError: The disk is full or the path cannot be written.
    """
    target = Path(os.path.realpath(path))
    with storage_errors(path):
        target.parent.mkdir(parents=True, exist_ok=True)
        put_back(target)
        remove_abandoned(all_beside(target, "old"))
        _refuse_foreign(path, marker, unfinished)
        remove_abandoned(all_beside(target, "tmp"))
        with temporary_folder(target) as temp:
            yield temp
            if target.exists():
                shutil.copymode(target, temp)
            _settle(temp)
            _swap(temp, target)
        _sync(target.parent)


def _refuse_foreign(path: Path, marker: str, unfinished: Collection[str]) -> None:
    if path.exists() and not path.is_dir():
        raise InputError(
            f"{path} is a file, where a folder is to be written", hint="choose another output"
        )
    entries = set(names_in(path)) - set(unfinished)
    if entries and marker not in entries:
        raise InputError(
            f"{path} holds {len(entries)} entries but no {marker}: replacing it would lose them",
            hint="choose a new or empty output folder",
        )


def names_in(folder: Path) -> list[str]:
    """Names of what an output folder holds, in order; none where there is no such folder.

    Without its writer's lock, and without what writers who were killed had begun to write: they
    would make a folder of ours look like another's.
    """
    entries = folder.iterdir() if folder.is_dir() else ()
    return sorted(
        entry.name for entry in entries if entry.name != LOCK_NAME and not is_temporary(entry)
    )


def refuse_others(folder: Path, others: Sequence[str], lacking: str) -> None:
    """Refuse a folder that holds other things than what a run would go on from.

    Args:
        folder: The folder to write.
        others: Names of what is in the way.
        lacking: What it would need to hold for them to be ours.

    Raises:
        InputError: Something is in the way.
    """
    if others:
        raise InputError(
            f"{folder} holds other things ({', '.join(others[:3])}) and no {lacking}",
            hint="choose a new or empty folder for --out",
        )


def _swap(temp: Path, target: Path) -> None:
    if not target.exists():
        os.rename(temp, target)
        return
    # The writer's lock must outlive the folder that it lies in.
    if (target / LOCK_NAME).exists():
        os.replace(target / LOCK_NAME, temp / LOCK_NAME)
    for name in names_in(target):
        # What begins with a dot is the user's own (a .git, say), which no writer of ours makes.
        if name.startswith(".") and not (temp / name).exists():
            _copy(target / name, temp / name)
    old = beside(target, "old")
    with held(target, fcntl.LOCK_SH):
        os.rename(target, old)
        os.rename(temp, target)
    shutil.rmtree(old, ignore_errors=True)


def _copy(source: Path, target: Path) -> None:
    # Never moved: a run that is killed must leave the old folder whole.
    if source.is_dir() and not source.is_symlink():
        shutil.copytree(source, target, symlinks=True)
    else:
        shutil.copy2(source, target, follow_symlinks=False)


def put_back(path: Path) -> None:
    """Give a folder back that `replace_directory` was killed in replacing, if it was."""
    target = Path(os.path.realpath(path))
    if target.exists() or not target.parent.is_dir():
        return
    for entry in sorted(all_beside(target, "old"), key=_changed_at, reverse=True):
        with held(entry, fcntl.LOCK_EX) as is_abandoned:
            if is_abandoned:
                os.rename(entry, target)
                return


def _changed_at(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        # Another run has cleared it away.
        return 0.0


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _settle(folder: Path) -> None:
    # safetensors makes files that only their owner can read, whatever the umask says.
    mode = folder.stat().st_mode & 0o666
    for parent, _, names in os.walk(folder):
        for name in names:
            os.chmod(Path(parent, name), mode)
            _sync(Path(parent, name))
        _sync(Path(parent))


@contextmanager
def lock(folder: Path) -> Iterator[None]:
    """Be the only writer of an output folder; the folder is made if it is missing.

    The lock ends with the process, however it ends: a killed run leaves none behind. What killed
    runs had begun to write in the folder is removed. A folder that was made and left empty, as
    when the input was refused, is removed again.

    Raises:
        InputError: Another run is writing this folder.
        StorageError: The folder cannot be written.
    """
    with storage_errors(folder):
        # Else an old folder that a killed run has left aside would be taken for a leftover.
        put_back(folder)
        is_new = not folder.exists()
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = _locked(folder)
    try:
        # Also beside files that are whole: a kill may come between a file's taking its name and
        # the removal of the folder that it was written in.
        with storage_errors(folder):
            remove_abandoned([entry for entry in folder.iterdir() if is_temporary(entry)])
        yield
    finally:
        if is_at(descriptor, folder / LOCK_NAME):
            (folder / LOCK_NAME).unlink(missing_ok=True)
            if is_new:
                # It refuses a folder that holds anything.
                with suppress(OSError):
                    folder.rmdir()
        os.close(descriptor)


def _locked(folder: Path) -> int:
    while True:
        descriptor = os.open(folder / LOCK_NAME, os.O_RDWR | os.O_CREAT, 0o644)
        with ExitStack() as unless_held:
            unless_held.callback(os.close, descriptor)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise InputError(
                    f"another run is writing {folder}",
                    hint="wait until it ends, or choose another output folder",
                ) from error
            # The former owner may have removed the file between our opening and locking it.
            if is_at(descriptor, folder / LOCK_NAME):
                unless_held.pop_all()
                return descriptor


def write_json(path: Path, value: Any) -> None:
    """Write a value as JSON, atomically: sorted keys, indent 1, UTF-8, a final line break.

    Raises:
        NumericalError: The value holds a number that is not finite, which JSON cannot say.
        StorageError: The disk is full or the path cannot be written.
    """
    try:
        text = json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False)
    except ValueError as error:
        raise NumericalError(
            f"{path} would hold a value that JSON cannot say: {error}",
            hint="find the step that made a number infinite or undefined",
        ) from error
    write_atomic(path, f"{text}\n".encode())


def read_json(path: Path, kind: str, *, error: type[TrimtabError] = InputError) -> dict[str, Any]:
    """Read a JSON object; a key that stands twice, NaN and infinities are refused.

    Args:
        path: The file.
        kind: What the file is, for messages, for example "adapter manifest".
        error: Class of the error to raise.

    Raises:
        TrimtabError: Of the given class: no such file, not UTF-8, not JSON, or not an object.
    """
    try:
        value = json.loads(
            path.read_bytes().decode(), object_pairs_hook=_unique, parse_constant=_refuse_constant
        )
    except OSError as cause:
        raise error(
            f"cannot read the {kind} {path}: {cause.strerror}",
            hint="check the path; an interrupted run is completed by running it again",
        ) from cause
    except (ValueError, RecursionError) as cause:
        raise error(
            f"the {kind} {path} is not valid JSON: {cause}",
            hint="the file was changed or cut off; fetch it or make it again",
        ) from cause
    if not isinstance(value, dict):
        raise error(
            f"the {kind} {path} is a JSON {type(value).__name__}, expected an object",
            hint="the file is not what its name says; fetch it or make it again",
        )
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        keys = [key for key, _ in pairs]
        twice = sorted({key for key in keys if keys.count(key) > 1})
        raise ValueError(f"keys that stand twice: {', '.join(twice)}")
    return value


def _refuse_constant(name: str) -> None:
    raise ValueError(f"the number {name}")


def sha256_bytes(data: bytes) -> str:
    """Fingerprint of bytes: sha256 in lower-case hexadecimal."""
    return hashlib.sha256(data).hexdigest()


def sha256_file(path: Path) -> str:
    """Fingerprint of a file's full content, read in pieces.

    Raises:
        OSError: The file cannot be read.
    """
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def package_versions() -> dict[str, str]:
    """Versions of the packages that decide a result, without importing them.

    A package that is not installed (trimtab itself, when run from a source tree) says so.
    """
    return {name: _version(name) for name in _PACKAGES}


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"
