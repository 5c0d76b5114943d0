"""The recorded compatibility of families, and its table."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trimtab.store.files import read_json

RESULTS = Path("bench/results/compatibility.json")
SCHEMA = "trimtab.compatibility"
VERSION = 1
COLUMNS = {
    "logits": "logits",
    "head": "head",
    "memory": "memory",
    "head+memory": "head + memory",
    "expert": "expert beside it",
    "small": "as small model",
}


def kept_rows(path: Path = RESULTS) -> list[dict[str, Any]]:
    """Rows of the results, if there are any."""
    if not path.is_file():
        return []
    return list(read_json(path, "compatibility results")["rows"])


def table(path: Path) -> str:
    """The table of families and carriers, and below it the messages that it numbers."""
    found = read_json(path, "compatibility results")
    notes: dict[str, int] = {}
    lines = [f"| family | {' | '.join(COLUMNS.values())} |", "|---" * (len(COLUMNS) + 1) + "|"]
    for row in found["rows"]:
        cells = [_shown(row["cells"].get(name), row["name"], notes) for name in COLUMNS]
        lines.append(f"| {row['name']} (`{row['model_type']}`) | {' | '.join(cells)} |")
    versions = ", ".join(f"{name} {found['packages'][name]}" for name in ("torch", "transformers"))
    numbered = [f"{number}. {message}" for message, number in notes.items()]
    source = f"{len(found['rows'])} families, {found['date']}, {versions}: `{RESULTS.as_posix()}`."
    return "\n".join([*lines, "", *numbered, *([""] if numbered else []), source])


def _shown(cell: Mapping[str, Any] | None, family: str, notes: dict[str, int]) -> str:
    if cell is None:
        return ""
    if cell["status"] == "works":
        return f"{cell['worst']:.0e}"
    # One note for all families that are told the same.
    message = re.sub(r" \(\w+\)", "", cell["message"].splitlines()[0].rstrip("("))
    message = re.sub(rf"\b{re.escape(family)}\b", "the model", message).replace("|", "\\|")
    number = notes.setdefault(message, len(notes) + 1)
    status = cell["status"] if cell["status"] == "refused" else f"**{cell['status']}**"
    return f"{status} ({number})"
