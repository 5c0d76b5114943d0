"""Settings by name from a file. No torch."""

import json
from pathlib import Path
from typing import Any

from trimtab.errors import InputError


def read_values(path: Path, asked_by: str) -> dict[str, Any]:
    """Read settings by name from a TOML or JSON file.

    Args:
        path: The file; .json is read as JSON, anything else as TOML.
        asked_by: What named the file, for the errors.

    Raises:
        InputError: The file cannot be read or holds no table.
    """
    # Loaded here, not above: most commands are given no file.
    import tomllib

    hint = "give a .toml or .json file with the names of options as keys, for example max_tokens"
    try:
        text = path.read_text(encoding="utf-8")
        values = json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
    except OSError as error:
        raise InputError(f"{asked_by} {path}: {error.strerror}", hint=hint) from error
    except ValueError as error:
        raise InputError(f"{asked_by} {path} cannot be read: {error}", hint=hint) from error
    if not isinstance(values, dict):
        raise InputError(f"{asked_by} {path} holds no table of settings", hint=hint)
    return values
