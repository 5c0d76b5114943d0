"""Measure which families work with which carriers, on small random models.

    python -m bench.compatibility [--only MODEL_TYPE ...]

Adds what it finds to bench/results/compatibility.json, family by family: one that is there already
is measured again. The documentation's table is made from it (`python -m tools.generated_docs`).
"""

import argparse
import tempfile
import warnings
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from bench.compatibility.adapter import small_adapter
from bench.compatibility.families import FAMILIES
from bench.compatibility.measure import measure
from bench.compatibility.table import RESULTS, SCHEMA, VERSION, kept_rows
from trimtab.store.files import package_versions, write_json


def main() -> None:
    """Measure families and keep what is found after each."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--only", nargs="*", help="transformers' model types (default: all)")
    only = parser.parse_args().only
    # Packages that some families would be faster with, and PEFT's older names.
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as temp:
        adapter = small_adapter(Path(temp))
        for number, family in enumerate(FAMILIES):
            if only and family.model_type not in only:
                continue
            folder = Path(temp) / str(number)
            folder.mkdir()
            cells = measure(family, adapter, folder)
            row = {"name": family.name, "model_type": family.model_type}
            row["cells"] = {name: asdict(cell) for name, cell in cells.items()}
            print(family.name, {name: cell.status for name, cell in cells.items()}, flush=True)
            keep(row)


def keep(row: dict[str, Any]) -> None:
    """Put a family's row into the results."""
    rows = {one["name"]: one for one in kept_rows()} | {row["name"]: row}
    found = {"schema": SCHEMA, "version": VERSION, "date": datetime.now(UTC).date().isoformat()}
    found |= {"packages": package_versions()}
    found |= {"rows": [rows[family.name] for family in FAMILIES if family.name in rows]}
    write_json(RESULTS, found)


if __name__ == "__main__":
    main()
