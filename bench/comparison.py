"""Gather a comparison's report and what its figures follow from into one small file.

`python -m bench.comparison FOLDER --out bench/results/NAME.json`
"""

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bench.cost.cpu_flops import processor
from trimtab.comparing.kept import FOLDER, STEPS
from trimtab.store.files import read_json, write_json


def main() -> None:
    """Read the folder and write the file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--note", default="", help="what is to be known of the machine meanwhile")
    given = parser.parse_args()
    write_json(given.out, gathered(given.folder) | {"note": given.note, "processor": processor()})


def gathered(folder: Path) -> dict[str, Any]:
    """The report, with the results of methods and steps under the names of their files."""
    report = read_json(folder / "comparison.json", "comparison")
    report["config"] = {name: portable(value) for name, value in report["config"].items()}
    files = [path for part in (FOLDER, STEPS) for path in sorted((folder / part).glob("*.json"))]
    report["files"] = {
        path.relative_to(folder).as_posix(): read_json(path, "part of a comparison")
        for path in files
    }
    asked = folder / "data" / "asked.jsonl"
    if asked.is_file():
        lines = asked.read_text(encoding="utf-8").splitlines()
        report["asked"] = [json.loads(line)["answer"] for line in lines]
    return report


def portable(value: Any) -> Any:
    """A setting without the folders above what it names."""
    if isinstance(value, str) and value.startswith("/"):
        return "/".join(Path(value).parts[-2:])
    if isinstance(value, list):
        return [portable(one) for one in value]
    if isinstance(value, Mapping):
        return {name: portable(one) for name, one in value.items()}
    return value


if __name__ == "__main__":
    main()
