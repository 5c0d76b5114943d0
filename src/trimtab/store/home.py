"""Where Trimtab keeps what it makes for itself on this machine."""

import os
from pathlib import Path
from typing import Any

from trimtab.errors import InputError
from trimtab.store.files import read_json

HOME_VARIABLE = "TRIMTAB_HOME"


def trimtab_home() -> Path:
    """Tell where Trimtab keeps what it makes for itself.

    Returns:
        $TRIMTAB_HOME, or ~/.cache/trimtab. The folder need not exist.
    """
    named = os.environ.get(HOME_VARIABLE, "")
    return Path(named).expanduser() if named else Path.home() / ".cache" / "trimtab"


def read_kept(path: Path) -> dict[str, Any] | None:
    """Read a JSON object that can be made again; None where it is missing or damaged."""
    try:
        return read_json(path, "kept file")
    except InputError:
        return None
