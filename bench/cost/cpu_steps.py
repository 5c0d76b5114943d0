"""Time pieces of real work on one core, beside the operations that the cost model counts for them.

`python -m bench.cost.cpu_steps --small FILE --host FILE --out FILE --date DAY`. Seconds are those
that the processor worked for this process, so that other work on the machine counts little; of a
few repetitions the fastest counts. Float32, one thread.
"""

import argparse
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model

from bench.cost.cpu_flops import processor
from trimtab.backends.hf import HFModel
from trimtab.backends.open import open_model
from trimtab.costing import flops
from trimtab.costing.sheet import read_sheet
from trimtab.fitting.head import HeadData, HeadSettings, fit_head
from trimtab.store.files import write_json

REPETITIONS = 3
MATRIX = 576
RANK = 16
POSITIONS, ACTIVE, HEAD_RANK = 1024, 8192, 64


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    for name in ("--small", "--host", "--out", "--date"):
        parser.add_argument(name, required=True)
    given = parser.parse_args()
    torch.set_num_threads(1)
    peak = 2 * MATRIX**3 * 100 / fastest(matrix_products())
    rows = [*of_model("SmolLM2-135M-Instruct", given.small), head_row()]
    rows += of_model("Gemma 3 270M", given.host)
    what = "seconds of processor time on one core, float32, fastest of three; flops: as counted by"
    content = {"schema": 1, "date": given.date, "what": f"{what} trimtab.costing.flops"}
    content |= {"processor": processor(), "matrix": MATRIX, "flops_per_sec": peak, "rows": rows}
    write_json(Path(given.out), content)
    for row in rows:
        least = row["flops"] / peak
        print(f"{row['work']:50} {least:7.2f} {row['sec']:7.2f} {row['sec'] / least:5.2f}")


def fastest(work: Callable[[], object]) -> float:
    """Least processor seconds of a few runs."""
    took = []
    for _ in range(REPETITIONS):
        started = time.process_time()
        work()
        took.append(time.process_time() - started)
    return min(took)


def matrix_products() -> Callable[[], object]:
    """A hundred products of square matrices, as wide as the small model."""
    a, b = torch.randn(MATRIX, MATRIX), torch.randn(MATRIX, MATRIX)
    return lambda: [a @ b for _ in range(100)]


def of_model(title: str, ref: str) -> Iterator[dict[str, object]]:
    """A forward pass to the hidden states, and a step of LoRA and of full training."""
    model = open_model(ref, dtype="float32")
    shape = read_sheet().shape(sum(weight.numel() for weight in model.model.parameters()))
    ids = torch.randint(100, 10_000, (1, 512))
    with torch.inference_mode():
        sec = fastest(lambda: model.hidden(ids))
    yield row(f"{title}, hidden states of 512 tokens", 512 * flops.hidden_flops(shape, 256), sec)
    ids = ids[:, :256]
    model.model.requires_grad_(True)
    sec = fastest(lambda: step(model.model, ids))
    yield row(f"{title}, full, 256 tokens", 256 * flops.full_training_flops(shape, 128), sec)
    yield lora_row(title, model, ids, 256 * flops.lora_training_flops(shape, 128, RANK))


def lora_row(title: str, model: HFModel, ids: torch.Tensor, needed: float) -> dict[str, object]:
    """A step of LoRA."""
    model.model.zero_grad(set_to_none=True)
    settings = LoraConfig(r=RANK, target_modules="all-linear", task_type="CAUSAL_LM")
    wrapped = get_peft_model(model.model, settings)
    return row(f"{title}, LoRA, 256 tokens", needed, fastest(lambda: step(wrapped, ids)))


def step(model: Callable[..., object], ids: torch.Tensor) -> None:
    """Forward and backward pass of one window."""
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()  # pyright: ignore


def head_row() -> dict[str, object]:
    """A pass of a head's fit over random states of the small model's width."""
    hidden, rows = torch.randn(POSITIONS, MATRIX), torch.randn(ACTIVE, MATRIX)

    def logits(batch: torch.Tensor, compared: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return hidden[batch] @ rows[compared].T, hidden[batch] @ rows[compared].T

    data = HeadData(hidden, logits, torch.ones(POSITIONS))
    settings = HeadSettings(HEAD_RANK, 1, 1e-3, 0)
    moments = (torch.zeros(MATRIX), torch.ones(MATRIX))
    fit = flops.HeadFit(POSITIONS, MATRIX, flops.COMPARED, HEAD_RANK, 1)
    sec = fastest(lambda: fit_head(data, rows, moments, settings))
    return row(f"head, one pass over {POSITIONS:,} positions", flops.head_fit_flops(fit), sec)


def row(work: str, needed: float, sec: float) -> dict[str, object]:
    """A piece of work with its operations and its seconds."""
    return {"work": work, "flops": needed, "sec": sec}


if __name__ == "__main__":
    main()
