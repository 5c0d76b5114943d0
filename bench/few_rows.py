"""How long a few states take times a weight, in both orders of the factors.

`python -m bench.few_rows --out FILE`. Linear layers of the packaged models' sizes, as many as no
cache holds; of some repetitions the fastest counts, since other work can only slow one down.
"""

import argparse
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from bench.timed_rows import write_rows
from trimtab import few_rows

ROWS = (1, 2, 3, 4, 6, 8, 12, 16, 32, 64, 128, 256)
REPETITIONS = 7
WEIGHTS = 2**25
"""Numbers in the weights of a size at least: 64 MB in bfloat16."""

SIZES = {
    "smollm2-135m": ((1_536, 576), (576, 1_536)),
    "gemma-3-270m": ((2_048, 640), (640, 2_048)),
    "qwen2.5-0.5b": ((4_864, 896), (896, 4_864)),
    "qwen2.5-1.5b": ((8_960, 1_536), (1_536, 8_960)),
    "head of gemma-3-270m": ((65_536, 640),),
}


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    given = parser.parse_args()
    rows = [
        {"sizes": name, "rows": count, **_measured(shapes, count, getattr(torch, given.dtype))}
        for name, shapes in SIZES.items()
        for count in ROWS
    ]
    write_rows(
        given.out,
        "states times transposed weight, as torch's linear layers ask, and the weight"
        f" times transposed states (trimtab.few_rows), {given.dtype}",
        rows,
    )
    for row in rows:
        print("{sizes:>22} {rows:>4}  {linear_sec:.4f}  {exchanged_sec:.4f}".format(**row))


@torch.no_grad()
def _measured(
    shapes: Sequence[tuple[int, int]], count: int, dtype: torch.dtype
) -> dict[str, float]:
    each = max(1, WEIGHTS // sum(outputs * columns for outputs, columns in shapes))
    weights = [torch.randn(shape).to(dtype) for shape in shapes for _ in range(each)]
    states = {columns: torch.randn(count, columns).to(dtype) for _, columns in shapes}

    def over(way: Callable[[Tensor, Tensor], Tensor]) -> float:
        return min(_timed(way, weights, states) for _ in range(REPETITIONS))

    return {"linear_sec": over(functional.linear), "exchanged_sec": over(few_rows.exchanged)}


def _timed(
    way: Callable[[Tensor, Tensor], Tensor], weights: Sequence[Tensor], states: dict[int, Tensor]
) -> float:
    began_sec = time.perf_counter()
    for weight in weights:
        way(states[weight.shape[1]], weight)
    return time.perf_counter() - began_sec


if __name__ == "__main__":
    main()
