"""What a loss of `tune` gains on a domain, and costs general text, for expert and steered host.

    python -m bench.tune_loss --small MODEL --host MODEL --data FOLDER --zig FOLDER \
        --leave-out FOLDER ... --folder NEW --out RESULT.json

Tunes the small model with each loss at each learning rate on the same text, makes an adapter of
each expert, and measures all on Zig files that nobody has trained or tested on, and on modules of
Python's library of which that holds too: a choice among rates and losses is then no choice on a
test. Ended, it goes on where it was.
"""

import argparse
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from itertools import product
from pathlib import Path
from typing import Any

from bench.held_out import python_documents, zig_documents
from bench.timed_rows import write_rows
from trimtab.config import (
    EvaluateConfig,
    FitConfig,
    RecordConfig,
    RowName,
    TuneConfig,
)
from trimtab.evaluate import evaluate
from trimtab.fit import fit
from trimtab.progress import Display
from trimtab.record import record
from trimtab.store.expert import read_expert
from trimtab.tune import tune

LOSSES = ("cross-entropy", "eaft")
RATES = (3e-4, 1e-3, 3e-3)
ROWS: tuple[RowName, ...] = ("host", "reference", "expert", "head+memory", "live", "all")


def arguments() -> argparse.Namespace:
    """From the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--small", required=True)
    parser.add_argument("--host", required=True)
    parser.add_argument("--data", required=True, help="training text")
    parser.add_argument("--zig", type=Path, required=True)
    parser.add_argument("--leave-out", type=Path, nargs="*", default=[])
    parser.add_argument("--documents", type=int, default=8, help="of each kind of text")
    parser.add_argument("--document-tokens", type=int, default=384)
    parser.add_argument("--seed", type=int, nargs="*", default=[0])
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    return parser.parse_args()


def lay_texts(given: argparse.Namespace) -> Path:
    """The text that is scored, a file a document: a folder for Zig and one for Python."""
    folder = given.folder / "scored"
    shutil.rmtree(folder, ignore_errors=True)
    kinds = {"zig": zig_documents(given.zig, given.leave_out), "python": python_documents()}
    for kind, documents in kinds.items():
        (folder / kind).mkdir(parents=True)
        for one in documents[: given.documents]:
            place = folder / kind / one.name.replace("/", "-")
            place.write_text(one.text, encoding="utf-8")
    return folder


def row(
    given: argparse.Namespace, texts: Path, loss: str, rate: float, seed: int
) -> Mapping[str, Any]:
    """One expert and its adapter: what all rows are, and how they differ from the host."""
    display = Display().progress
    folder = given.folder / f"{loss}-{rate:g}-{seed}"
    settings = {"loss": loss, "learning_rate": rate, "seed": seed, "out": folder / "expert"}
    tuned = TuneConfig.model_validate({"model": given.small, "data": (given.data,), **settings})
    tune(tuned, progress=display)
    record(RecordConfig(expert=tuned.out, out=folder / "recording"), progress=display)
    adapter = folder / "zig.adapter"
    fit(FitConfig(recording=folder / "recording", out=adapter), progress=display)
    asked = EvaluateConfig(
        adapter=adapter,
        host=given.host,
        data=(str(texts / "zig"),),
        general=(f"python={texts / 'python'}",),
        document_tokens=given.document_tokens,
        max_tokens=given.documents * given.document_tokens,
        rows=ROWS,
        out=folder / "report",
    )
    [found] = evaluate(asked, progress=display).report.hosts
    figures = {
        "domain_bits_per_byte": found.domain,
        "general_bits_per_byte": found.general,
        "domain_change_bits_per_byte": found.domain_change,
        "general_change_bits_per_byte": found.general_change,
    }
    held_out = read_expert(tuned.out).held_out
    return {
        "loss": loss,
        "learning_rate": rate,
        "seed": seed,
        "validations_nats_per_token": None if held_out is None else held_out.nats_per_token,
        **{name: {n: asdict(one) for n, one in by.items()} for name, by in figures.items()},
    }


def main() -> None:
    """Measure and write, after each expert what is known by then."""
    given, rows = arguments(), []
    texts = lay_texts(given)
    for seed, rate, loss in product(given.seed, RATES, LOSSES):
        rows.append(row(given, texts, loss, rate, seed))
        write_rows(given.out, "bits per byte by loss of tune, with standard errors", rows)


if __name__ == "__main__":
    main()
