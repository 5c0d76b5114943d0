"""A small adapter with all carriers, whose memory speaks."""

import random
from pathlib import Path
from typing import Any

from trimtab.config import FitConfig, RecordConfig, TuneConfig
from trimtab.fit import fit
from trimtab.record import record
from trimtab.store.adapter_schema import Gate
from trimtab.store.card import write_adapter
from trimtab.store.manifest import read_manifest
from trimtab.tune import tune

SMALL = "tiny:llama?vocab=bpe&hidden=32"
WORDS = ("keel", "rudder", "tiller", "anchor", "hull", "mast", "sail", "rope", "winch", "buoy")
_GATE_WEIGHTS = (-1.5, 1.0, 1.0, 1.0, 0.1, 0.05, 0.1)


def small_adapter(folder: Path, small: str = SMALL) -> Path:
    """Make an adapter of a toy model on a little text.

    Args:
        folder: Empty.
        small: The toy model.
    """
    chosen = random.Random(0)
    for number in range(4):
        one = [chosen.choice(WORDS) for _ in range(60)]
        lines = [f"The {a} turns the {b}." for a, b in zip(one[::2], one[1::2], strict=True)]
        (folder / f"{number}.txt").write_text("\n".join(lines), encoding="utf-8")
    (folder / "one.md").write_text("Plain prose, about nothing in particular. " * 12)
    shared: dict[str, Any] = {"dtype": "float32", "window_tokens": 128}
    tuning = {"model": small, "data": (str(folder / "*.txt"),), "out": folder / "expert"}
    tuning |= {"learning_rate": 1e-2, "held_out": 0.25, "validations": 1}
    tune(TuneConfig.model_validate(tuning | shared))
    recording = {"expert": folder / "expert", "out": folder / "recording", "stride_tokens": 96}
    recording |= {"general": (str(folder / "*.md"),)}
    record(RecordConfig.model_validate(recording | shared))
    fitting = {"recording": folder / "recording", "out": folder / "adapter", "rank": 8}
    fitting |= {"learning_rate": 3e-2, "epochs": 4, "active_tokens": 256, "key_size": 16}
    return with_plain_gate(fit(FitConfig.model_validate(fitting | {"general_weight": 0.1})).folder)


def with_plain_gate(folder: Path) -> Path:
    """Give an adapter's memory a gate that opens.

    A random reference is equally unsure everywhere, from which none can be learnt.
    """
    manifest = read_manifest(folder)
    assert manifest.memory
    gate = Gate(features=manifest.memory.gate.features, weights=_GATE_WEIGHTS)
    gates = {"gate": gate, "own_gate": gate, "bytes_gate": gate}
    carriers = {**manifest.carriers, "memory": manifest.memory.model_copy(update=gates)}
    write_adapter(folder, manifest.model_copy(update={"carriers": carriers}))
    return folder
