"""Measure how many 32-bit operations a second this processor's matrix product reaches.

`python -m bench.cost.cpu_flops --out FILE`. One thread (set OMP_NUM_THREADS for more), square
matrices; of many short repetitions the fastest counts, since other work on the machine can only
slow one down.
"""

import argparse
import platform
import time
from pathlib import Path

import torch

from trimtab.store.files import package_versions, write_json

SIZES = (256, 576, 1024, 1536)
REPETITIONS = 24


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--date", required=True, help="day of the measurement, YYYY-MM-DD")
    given = parser.parse_args()
    rows = [{"size": size, "flops_per_sec": measured(size)} for size in SIZES]
    write_json(
        given.out,
        {
            "schema": 1,
            "date": given.date,
            "what": "fastest float32 matrix product of two square matrices, torch, on one of two"
            " cores that other work shared",
            "threads": torch.get_num_threads(),
            "processor": processor(),
            "torch": package_versions().get("torch", torch.__version__),
            "rows": rows,
        },
    )
    for row in rows:
        print(f"{row['size']:>6}  {row['flops_per_sec'] / 1e9:.1f} GFLOP/s")


@torch.no_grad()
def measured(size: int) -> float:
    """Operations a second of the fastest product of two matrices of size by size."""
    a, b = torch.randn(size, size), torch.randn(size, size)
    out = torch.empty(size, size)
    best = float("inf")
    for _ in range(REPETITIONS):
        started = time.perf_counter()
        torch.mm(a, b, out=out)
        best = min(best, time.perf_counter() - started)
    return 2 * size**3 / best


def processor() -> str:
    """Name of the processor, and its vector instructions where Linux tells them."""
    info = Path("/proc/cpuinfo")
    if not info.is_file():
        return platform.processor()
    text = info.read_text()
    name = text.partition("model name")[2].partition(":")[2].partition("\n")[0].strip()
    flags = set(text.partition("flags")[2].partition("\n")[0].split())
    known = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")
    return f"{name}, {', '.join(flag for flag in known if flag in flags)}"


if __name__ == "__main__":
    main()
