"""Task files of lm-evaluation-harness on this machine: a YAML file, and the data that it names."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from trimtab.errors import InputError
from trimtab.store.files import sha256_file

READERS = ("json", "csv", "parquet", "text")
"""Readers of local data that the package `datasets` carries, by the name of `dataset_path`."""

_CODE_KEYS = ("include", "class", "custom_dataset", "unsafe_code")
"""Keys of a task file with which other files, or code, would come in."""

_HINT = "see lm-evaluation-harness's guide to task files; docs/evaluate.md has an example"


@dataclass(frozen=True)
class LocalTask:
    """A task of a file.

    Attributes:
        name: Its name in the report.
        config: What lm-eval is given, with the paths of its data made absolute.
        sha256: Fingerprint of the task file and of its data.
    """

    name: str
    config: Mapping[str, Any]
    sha256: str


def read_task(path: Path) -> LocalTask:
    """Read a task file: a multiple-choice, log-likelihood or generation task in YAML.

    Files that name code (`!function`, a `class`) or other files (`include`) are refused, and so
    are data sets of a hub: what is run is what the file says, here.

    Args:
        path: The YAML file; `data_files` in it are looked for beside it.

    Raises:
        InputError: The file or its data cannot be read, or it asks for what is refused.
    """
    config = _yaml(path)
    name = config.get("task")
    if not isinstance(name, str) or not name:
        raise InputError(f"the task file {path} has no name under `task`", hint=_HINT)
    refused = [key for key in _CODE_KEYS if config.get(key)]
    if refused:
        raise InputError(
            f"the task file {path} has {', '.join(refused)}, which can bring in other files or"
            " code",
            hint="write the whole task into the one file, without code",
        )
    reader = config.get("dataset_path")
    if reader not in READERS:
        raise InputError(
            f"the task file {path} has dataset_path {reader!r}, expected one of"
            f" {', '.join(READERS)}",
            hint="name local data: dataset_path: json, and data_files under dataset_kwargs",
        )
    files, named = _data_files(path, config)
    digest = hashlib.sha256(path.read_bytes())
    for file in files:
        digest.update(sha256_file(file).encode())
    kwargs = {**config["dataset_kwargs"], "data_files": named}
    return LocalTask(name, {**config, "dataset_kwargs": kwargs}, digest.hexdigest())


def _yaml(path: Path) -> dict[str, Any]:
    try:
        # The safe loader knows no tag that names code: lm-eval's own would run it.
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"cannot read the task file {path}: {error.strerror}", hint=_HINT) from (
            error
        )
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise InputError(
            f"the task file {path} cannot be read: {reason}",
            hint="code (`!function`) is not run: use templates and lm-eval's own metrics",
        ) from error
    if not isinstance(config, dict):
        raise InputError(f"the task file {path} is no table of settings", hint=_HINT)
    return config


def _data_files(path: Path, config: Mapping[str, Any]) -> tuple[list[Path], dict[str, list[str]]]:
    kwargs = config.get("dataset_kwargs")
    named = kwargs.get("data_files") if isinstance(kwargs, dict) else None
    if isinstance(named, str | list):
        named = {"train": named}
    if not isinstance(named, dict) or not named:
        raise InputError(
            f"the task file {path} names no data_files under dataset_kwargs", hint=_HINT
        )
    found = {
        str(split): [(path.parent / str(name)).resolve() for name in _many(names)]
        for split, names in named.items()
    }
    every = [file for files in found.values() for file in files]
    missing = [file for file in every if not file.is_file()]
    if missing:
        raise InputError(
            f"the task file {path} names {missing[0]}, which is not there",
            hint="data_files are paths beside the task file; give whole names",
        )
    return every, {split: [str(file) for file in files] for split, files in found.items()}


def _many(names: Any) -> Sequence[Any]:
    return names if isinstance(names, list) else [names]
