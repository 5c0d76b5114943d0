"""Text that Debian packages carry: downloaded and unpacked, never installed, never run."""

import hashlib
import re
import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from examples.demo.corpus import MARKER
from examples.demo.packages import SourceError
from trimtab.store.files import replace_directory


@dataclass(frozen=True)
class Package:
    """A Debian package of which some files are used.

    Attributes:
        name: Its name in Debian.
        keep: Regular expression of the files that are kept, searched for in their paths.
        version: The version that the recorded results were made with; another one may be there.
        licence: Terms, as the package states them.
        download_mb: About how much is downloaded.
    """

    name: str
    keep: str
    version: str
    licence: str
    download_mb: int


def folder_of(package: Package, cache: Path) -> Path:
    """Where the package's files lie once fetched."""
    return cache / "debian" / package.name


def is_fetched(package: Package, cache: Path) -> bool:
    """Whether the wanted files lie there, whole."""
    try:
        return _marker(folder_of(package, cache))[1:] == [package.keep]
    except OSError:
        return False


def version_of(package: Package, cache: Path) -> str:
    """Version of a fetched package."""
    return _marker(folder_of(package, cache))[0]


def _marker(folder: Path) -> list[str]:
    return (folder / MARKER).read_text(encoding="utf-8").splitlines()


def fetch_package(package: Package, cache: Path) -> Path:
    """Fetch the wanted files of a package, unless they are there, and return their folder.

    A file NAME_*.deb in the folder `debian` of the cache is used in place of a download.

    Raises:
        SourceError: The package cannot be fetched or unpacked, or has none of the wanted files.
        StorageError: The disk is full or the folder cannot be written.
    """
    target = folder_of(package, cache)
    if is_fetched(package, cache):
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    instead = _instead(package, target.parent)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".deb-") as scratch:
        archive = _given(package, target.parent) or _downloaded(package, Path(scratch), instead)
        unpacked = Path(scratch, "unpacked")
        _run(["dpkg-deb", "-x", str(archive), str(unpacked)], instead)
        version = _run(["dpkg-deb", "-f", str(archive), "Version"], instead).strip()
        with replace_directory(target, marker=MARKER) as fresh:
            if not _keep(package, unpacked, fresh):
                raise SourceError(
                    f"{archive.name} has no file that matches {package.keep}", hint=instead
                )
            (fresh / MARKER).write_text(f"{version}\n{package.keep}\n", encoding="utf-8")
    return target


def _instead(package: Package, folder: Path) -> str:
    return (
        "on a machine with Debian's apt-get and dpkg-deb, check the network and run apt-get"
        f" update; or get {package.name} {package.version} from a Debian mirror and put its .deb"
        f" file into {folder}; or leave this domain out"
    )


def _given(package: Package, folder: Path) -> Path | None:
    return max(folder.glob(f"{package.name}_*.deb"), default=None)


def _downloaded(package: Package, scratch: Path, instead: str) -> Path:
    download = ["apt-get", "--quiet", "download", package.name]
    try:
        _run(download, instead, scratch)
    except SourceError:
        # Lists of packages that are missing or old are the usual reason.
        _run(["apt-get", "--quiet", "update"], instead)
        _run(download, instead, scratch)
    found = _given(package, scratch)
    if found is None:
        raise SourceError(f"apt-get left no file {package.name}_*.deb", hint=instead)
    return found


def _run(words: list[str], instead: str, folder: Path | None = None) -> str:
    try:
        done = subprocess.run(
            words, cwd=folder, capture_output=True, text=True, stdin=subprocess.DEVNULL
        )
    except FileNotFoundError as error:
        raise SourceError(
            f"{words[0]} is not on this machine; Debian packages are fetched with it", hint=instead
        ) from error
    if done.returncode != 0:
        said = done.stderr.strip() or done.stdout.strip() or "nothing"
        raise SourceError(
            f"{' '.join(words)} failed with status {done.returncode} and said: {said}",
            hint=instead,
        )
    return done.stdout


def _keep(package: Package, unpacked: Path, fresh: Path) -> int:
    count = 0
    for path in sorted(unpacked.rglob("*")):
        name = path.relative_to(unpacked).as_posix()
        if path.is_symlink() or not path.is_file() or not re.search(package.keep, name):
            continue
        copy = fresh / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, copy)
        count += 1
    return count


def sha256_of_texts(texts: Mapping[str, str]) -> str:
    """Fingerprint of texts: names and contents, in order of the names."""
    digest = hashlib.sha256()
    for name in sorted(texts):
        content = hashlib.sha256(texts[name].encode()).hexdigest()
        digest.update(f"{content}  {name}\n".encode())
    return digest.hexdigest()
