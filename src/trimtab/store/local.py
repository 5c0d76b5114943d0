"""What Trimtab keeps on this machine, and adapters: installed, or below the current folder."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from trimtab.errors import AdapterError
from trimtab.store.adapter_schema import FORMAT, MANIFEST_NAME, AdapterManifest
from trimtab.store.files import read_json
from trimtab.store.home import trimtab_home
from trimtab.store.manifest import read_manifest

SEARCH_DEPTH = 4
"""Folders below the current one in which adapters are looked for."""

SUFFIX = ".adapter"


@dataclass(frozen=True)
class LocalAdapter:
    """One adapter folder that was found.

    Attributes:
        folder: Where it lies.
        manifest: What it says; None when it cannot be read.
        problem: Why it cannot be read, in one line; empty when it can.
    """

    folder: Path
    manifest: AdapterManifest | None
    problem: str = ""


def adapters_home() -> Path:
    """Tell where installed adapters live: the folder adapters in Trimtab's home."""
    return trimtab_home() / "adapters"


def list_adapters(*, home: Path | None = None, here: Path | None = None) -> list[LocalAdapter]:
    """Find the adapters on this machine; payload files are not read.

    Args:
        home: Folder of installed adapters (default: `adapters_home()`).
        here: Folder to search, itself and at most four levels down (default: the current one).

    Returns:
        Installed adapters first, then those found here, each once, ordered by path. A folder
        named *.adapter that cannot be read is listed with its problem.
    """
    found: dict[Path, LocalAdapter] = {}
    places = (home or adapters_home(), here or Path())
    for place in places:
        for folder in _candidates(place, SEARCH_DEPTH):
            adapter = _look_at(folder)
            if adapter is not None:
                found.setdefault(folder.resolve(), adapter)
    return list(found.values())


def _candidates(folder: Path, depth: int) -> Iterator[Path]:
    if (folder / MANIFEST_NAME).is_file() or folder.suffix == SUFFIX:
        yield folder
        return
    if depth == 0:
        return
    for child in _children(folder):
        yield from _candidates(child, depth - 1)


def _children(folder: Path) -> list[Path]:
    try:
        entries = sorted(folder.iterdir())
        return [
            e for e in entries if not e.name.startswith(".") and not e.is_symlink() and e.is_dir()
        ]
    except OSError:
        # A folder that we may not look into holds nothing that we could list.
        return []


def _look_at(folder: Path) -> LocalAdapter | None:
    try:
        return LocalAdapter(folder, read_manifest(folder, verify=False))
    except AdapterError as error:
        if folder.suffix == SUFFIX or _claims_to_be_one(folder):
            return LocalAdapter(folder, None, error.message)
        return None


def _claims_to_be_one(folder: Path) -> bool:
    try:
        raw = read_json(folder / MANIFEST_NAME, "manifest", error=AdapterError)
    except AdapterError:
        return False
    return raw.get("format") == FORMAT
