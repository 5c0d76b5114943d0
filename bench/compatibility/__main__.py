"""Measure which families work with which carriers, on small random models.

    python -m bench.compatibility [--only MODEL_TYPE ...]

Adds what it finds to bench/results/compatibility.json, family by family: one that is there already
is measured again. The documentation's table is made from it (`python -m tools.generated_docs`).
"""

import argparse
import random
import tempfile
import warnings
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from bench.compatibility.families import FAMILIES
from bench.compatibility.measure import measure
from bench.compatibility.table import RESULTS, SCHEMA, VERSION, kept_rows
from trimtab.config import FitConfig, RecordConfig, TuneConfig
from trimtab.fit import fit
from trimtab.record import record
from trimtab.store.adapter_schema import Gate
from trimtab.store.card import write_adapter
from trimtab.store.files import package_versions, write_json
from trimtab.store.manifest import read_manifest
from trimtab.tune import tune

SMALL = "tiny:llama?vocab=bpe&hidden=32"
WORDS = ("keel", "rudder", "tiller", "anchor", "hull", "mast", "sail", "rope", "winch", "buoy")
_GATE_WEIGHTS = (-1.5, 1.0, 1.0, 1.0, 0.1, 0.05, 0.1)


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


def small_adapter(folder: Path) -> Path:
    """An adapter with all carriers, of a toy model on a little text."""
    chosen = random.Random(0)
    for number in range(4):
        one = [chosen.choice(WORDS) for _ in range(60)]
        lines = [f"The {a} turns the {b}." for a, b in zip(one[::2], one[1::2], strict=True)]
        (folder / f"{number}.txt").write_text("\n".join(lines), encoding="utf-8")
    (folder / "one.md").write_text("Plain prose, about nothing in particular. " * 12)
    shared: dict[str, Any] = {"dtype": "float32", "window_tokens": 128}
    tuning = {"model": SMALL, "data": (str(folder / "*.txt"),), "out": folder / "expert"}
    tuning |= {"learning_rate": 1e-2, "held_out": 0.25, "validations": 1}
    tune(TuneConfig.model_validate(tuning | shared))
    recording = {"expert": folder / "expert", "out": folder / "recording", "stride_tokens": 96}
    recording |= {"general": (str(folder / "*.md"),)}
    record(RecordConfig.model_validate(recording | shared))
    fitting = {"recording": folder / "recording", "out": folder / "adapter", "rank": 8}
    fitting |= {"learning_rate": 3e-2, "epochs": 4, "active_tokens": 256, "key_size": 16}
    made = fit(FitConfig.model_validate(fitting | {"general_weight": 0.1})).folder
    # A random reference is equally unsure everywhere, from which no gate can be learnt.
    manifest = read_manifest(made)
    assert manifest.memory
    gate = Gate(features=manifest.memory.gate.features, weights=_GATE_WEIGHTS)
    gates = {"gate": gate, "own_gate": gate, "bytes_gate": gate}
    carriers = {**manifest.carriers, "memory": manifest.memory.model_copy(update=gates)}
    write_adapter(made, manifest.model_copy(update={"carriers": carriers}))
    return made


if __name__ == "__main__":
    main()
