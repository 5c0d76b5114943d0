"""What a run of record is of, so that only the same run may continue or reuse its folder."""

from pathlib import Path
from typing import Literal

from pydantic import JsonValue, ValidationError

from trimtab.errors import InputError
from trimtab.store.adapter_schema import Part, Sha256
from trimtab.store.files import names_in, read_json, refuse_others, write_json
from trimtab.store.recording_schema import PARTIAL_NAME

# The expert may have moved: its fingerprint is among the inputs.
_FREE_SETTINGS = {"expert", "out", "processes"}
_HINT = "choose another --out, or give the settings and the text of the first run"


class RecordingRun(Part):
    """Everything that decides a recording's bytes on one machine: partial.json until finished."""

    format: Literal["trimtab-recording-run"] = "trimtab-recording-run"
    """Names the format."""
    format_version: Literal[4] = 4
    """Version of the format; 1 divided the text into other shards, 2 let the expert read all, 3 had
    compact shards without what the reference foretells."""
    config: dict[str, JsonValue]
    """Resolved configuration, apart from the folder written to."""
    inputs: dict[str, Sha256]
    """Fingerprints of the expert and of the texts that were given."""
    packages: dict[str, str]
    """Versions of the packages that compute it."""


def begin_run(folder: Path, asked: RecordingRun) -> None:
    """Find the run that began in a folder, or begin one there.

    Raises:
        InputError: The folder holds other things, or a run with other settings, text or package
            versions.
        StorageError: The folder cannot be written.
    """
    if (folder / PARTIAL_NAME).is_file():
        found = _read(folder / PARTIAL_NAME)
        check_same_run(folder, found, asked)
        if found.packages != asked.packages:
            raise InputError(
                f"{folder} was begun with other package versions: {found.packages}",
                hint="choose another --out, or install those versions to continue",
            )
        return
    refuse_others(folder, names_in(folder), "recording")
    write_json(folder / PARTIAL_NAME, asked.model_dump(mode="json"))


def check_same_run(folder: Path, found: RecordingRun, asked: RecordingRun) -> None:
    """Refuse to continue or reuse a folder that was made with other settings or other inputs.

    Package versions are not compared: a finished recording outlives an upgrade.

    Raises:
        InputError: A setting or an input differs.
    """
    was, wanted = found.config, asked.config
    keys = sorted(was.keys() | wanted.keys())
    changed = [key for key in keys if key not in _FREE_SETTINGS and was.get(key) != wanted.get(key)]
    if changed:
        parts = (f"{key} is {wanted.get(key)!r}, was {was.get(key)!r}" for key in changed)
        raise InputError(f"{folder} was begun with other settings: {'; '.join(parts)}", hint=_HINT)
    names = sorted(found.inputs.keys() | asked.inputs.keys())
    others = [name for name in names if found.inputs.get(name) != asked.inputs.get(name)]
    if others:
        raise InputError(
            f"{' and '.join(others)} changed since the recording {folder} was begun", hint=_HINT
        )


def _read(path: Path) -> RecordingRun:
    try:
        return RecordingRun.model_validate(read_json(path, "unfinished recording"))
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(str(part) for part in problem["loc"])
        raise InputError(
            f"{path} is not valid: {where}: {problem['msg']}",
            hint="delete the folder and record again, or choose another --out",
        ) from error
