"""Reading and writing an adapter directory's manifest.json, with every file checked.

docs/format.md is the normative description of what is read and written here.
"""

import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from trimtab.config import CarrierName
from trimtab.errors import AdapterError
from trimtab.store.adapter_schema import (
    CARRIER_PATHS,
    FORMAT,
    FORMAT_VERSION,
    MANIFEST_NAME,
    AdapterManifest,
    FileEntry,
    carrier_of,
)
from trimtab.store.adapter_schema import BaseModelReference as BaseModelReference
from trimtab.store.adapter_schema import Blend as Blend
from trimtab.store.adapter_schema import Carrier as Carrier
from trimtab.store.adapter_schema import ExpertCarrier as ExpertCarrier
from trimtab.store.adapter_schema import Gate as Gate
from trimtab.store.adapter_schema import HeadCarrier as HeadCarrier
from trimtab.store.adapter_schema import Licences as Licences
from trimtab.store.adapter_schema import MemoryCarrier as MemoryCarrier
from trimtab.store.adapter_schema import Provenance as Provenance
from trimtab.store.checked import checked_sha256
from trimtab.store.files import read_json, sha256_file, write_json

_FETCH_AGAIN = "fetch the adapter again from where it came, or make it anew with `trimtab fit`"
_UPGRADE = "upgrade trimtab, or ask for the adapter in an older format version"


def write_manifest(
    folder: Path, manifest: AdapterManifest, *, hashed: Mapping[str, FileEntry] | None = None
) -> AdapterManifest:
    """Hash every file of an adapter directory and write its manifest.json, atomically.

    Args:
        folder: Adapter directory with its payload files in place.
        manifest: What to say; `files` and each carrier's `files` are computed anew.
        hashed: Files that the caller has hashed as they are now; they are not read again.

    Returns:
        The manifest as written.

    Raises:
        AdapterError: A carrier without payload, a payload without carrier, a link, or a file of
            no data format.
        NumericalError: A metric or a blend weight that is not finite.
        StorageError: The folder cannot be written.
    """
    complete = with_files(folder, manifest, hashed=hashed)
    write_json(folder / MANIFEST_NAME, complete.model_dump(mode="json"))
    return complete


def with_files(
    folder: Path, manifest: AdapterManifest, *, hashed: Mapping[str, FileEntry] | None = None
) -> AdapterManifest:
    """Fill in the files that lie in an adapter directory, without writing.

    Args:
        folder: Adapter directory with its payload files in place.
        manifest: What to say apart from its files.
        hashed: As in `write_manifest`.

    Returns:
        The manifest with `files` and each carrier's `files` from the directory.

    Raises:
        AdapterError: As in `write_manifest`.
    """
    paths = sorted(_payload_paths(folder))
    known = hashed or {}
    entries = {path: known[path] if path in known else _entry(folder / path) for path in paths}
    _check_every_payload_has_its_carrier(folder, manifest, paths)
    carriers = {
        name: carrier.model_copy(
            update={"files": tuple(path for path in paths if carrier_of(path) == name)}
        )
        for name, carrier in manifest.carriers.items()
    }
    update = {"files": entries, "carriers": carriers}
    try:
        return AdapterManifest.model_validate(manifest.model_copy(update=update).model_dump())
    except ValidationError as error:
        raise AdapterError(
            f"{folder} cannot be an adapter: {_first_problem(error)}",
            hint="move the file out of the folder, or correct the manifest's value",
        ) from error


def read_manifest(
    folder: Path, *, verify: bool = True, read_again: bool = False
) -> AdapterManifest:
    """Read an adapter directory's manifest and check that the directory is what it says.

    Args:
        folder: Adapter directory.
        verify: Also check every payload file; without it only manifest.json itself is checked.
        read_again: As for `verify_files`.

    Returns:
        The manifest.

    Raises:
        AdapterError: No adapter there, another format or a newer version, an unknown key, or a
            file that is missing, changed, unlisted, or a link.
    """
    manifest = parse_manifest(_raw_manifest(folder), where=str(folder / MANIFEST_NAME))
    if verify:
        verify_files(folder, manifest, read_again=read_again)
    return manifest


def parse_manifest(raw: dict[str, Any], *, where: str) -> AdapterManifest:
    """Turn the JSON object of a manifest.json into a manifest.

    Args:
        raw: The object.
        where: How errors call it.

    Returns:
        The manifest, complete with files.

    Raises:
        AdapterError: Another format, a newer version, an unknown key or a bad value.
    """
    _check_format(raw, where)
    try:
        # Strict JSON mode: no "1" for 1, but lists for tuples and text for times.
        manifest = AdapterManifest.model_validate_json(json.dumps(raw), strict=True)
    except ValidationError as error:
        raise AdapterError(f"{where}: {_first_problem(error)}", hint=_FETCH_AGAIN) from error
    for name, carrier in manifest.carriers.items():
        if not carrier.files:
            raise AdapterError(f"{where}: carrier {name!r} names no files", hint=_FETCH_AGAIN)
    return manifest


def verify_files(folder: Path, manifest: AdapterManifest, *, read_again: bool = False) -> None:
    """Check that an adapter directory holds exactly the files that its manifest lists.

    Names that begin with a dot are passed over: no reader opens them.

    Args:
        folder: Adapter directory.
        manifest: Its manifest.
        read_again: Read also large files that were found right before, and that the file system
            has not seen change since.

    Raises:
        AdapterError: A file that is missing, changed, unlisted, or a link.
    """
    hashed = sha256_file if read_again else checked_sha256
    present = set(_payload_paths(folder))
    for path, expected in manifest.files.items():
        if path not in present:
            raise AdapterError(f"{folder}: {path} is missing", hint=_FETCH_AGAIN)
        found = _entry(folder / path, hashed)
        if found != expected:
            raise AdapterError(
                f"{folder}: {path} has changed: found {found.bytes} bytes with sha256"
                f" {found.sha256[:12]}…, expected {expected.bytes} bytes with"
                f" {expected.sha256[:12]}…",
                hint=_FETCH_AGAIN,
            )
    unlisted = sorted(present - set(manifest.files))
    if unlisted:
        raise AdapterError(
            f"{folder}: not listed in {MANIFEST_NAME}: {', '.join(unlisted)}",
            hint="move these files out of the adapter's folder",
        )


def _raw_manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST_NAME
    if path.is_symlink():
        raise AdapterError(f"{path} is a link; an adapter has none", hint=_FETCH_AGAIN)
    if not path.exists():
        found = f"has no {MANIFEST_NAME}" if folder.is_dir() else "is no folder"
        raise AdapterError(
            f"{folder} {found}, so it is no adapter",
            hint="see `trimtab list` for the adapters here, or make one with `trimtab fit`",
        )
    return read_json(path, "adapter manifest", error=AdapterError)


def _check_format(raw: dict[str, Any], where: str) -> None:
    found, version = raw.get("format"), raw.get("format_version")
    if found != FORMAT:
        raise AdapterError(
            f"{where}: found format {found!r}, expected {FORMAT!r}",
            hint="name the folder of an adapter, as `trimtab fit` writes it",
        )
    if type(version) is not int or version < 1:
        raise AdapterError(
            f"{where}: found format_version {version!r}, expected {FORMAT_VERSION}",
            hint=_FETCH_AGAIN,
        )
    if version > FORMAT_VERSION:
        raise AdapterError(
            f"{where}: found format version {version}, this trimtab reads up to {FORMAT_VERSION}",
            hint=_UPGRADE,
        )


def _first_problem(error: ValidationError) -> str:
    problem = error.errors(include_url=False)[0]
    place = ".".join(str(part) for part in problem["loc"]) or "manifest"
    if problem["type"] == "extra_forbidden":
        return f"unknown key {place!r}"
    return f"{place}: {problem['msg'].removeprefix('Value error, ')}"


def _entry(path: Path, hashed: Callable[[Path], str] = sha256_file) -> FileEntry:
    return FileEntry(sha256=hashed(path), bytes=path.stat().st_size)


def _payload_paths(folder: Path) -> Iterator[str]:
    for parent, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted([*folders, *files]):
            path = Path(parent) / name
            if name.startswith(".") or path == folder / MANIFEST_NAME:
                continue
            if path.is_symlink() or not (path.is_file() or path.is_dir()):
                raise AdapterError(
                    f"{path} is a link or a device; an adapter holds plain files",
                    hint="put the file itself in its place, or remove it",
                )
            if name in files:
                yield path.relative_to(folder).as_posix()


def _check_every_payload_has_its_carrier(
    folder: Path, manifest: AdapterManifest, paths: list[str]
) -> None:
    owners: dict[CarrierName, str] = {}
    for path in paths:
        owner = carrier_of(path)
        if owner is not None:
            owners[owner] = path
    for name in manifest.carriers:
        if name not in owners:
            raise AdapterError(
                f"{folder}: the manifest has a carrier {name!r} but {CARRIER_PATHS[name]!r} is"
                " not there",
                hint="write the carrier's files before the manifest",
            )
    for name, path in owners.items():
        if name not in manifest.carriers:
            raise AdapterError(
                f"{folder}: {path} lies there but the manifest has no carrier {name!r}",
                hint="remove the file, or add the carrier to the manifest",
            )
