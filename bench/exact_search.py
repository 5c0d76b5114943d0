"""How long a memory's exact search takes: faiss' flat index, and torch's products.

`python -m bench.exact_search --out FILE`. Keys of 192 features, as memories have them; ways take
turns, and the median of some repetitions counts.
"""

import argparse
from pathlib import Path

import faiss
import torch
from torch.nn.functional import normalize

from bench.timed_rows import medians_sec, write_rows
from trimtab.carriers.search import NEIGHBOURS, nearest_keys

ENTRIES = (18_160, 131_000)
"""The demo's memory, and one just below where lists begin."""

QUESTIONS = (1, 8, 64, 256)
KEY_SIZE = 192
REPETITIONS = 7


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    torch.manual_seed(0)
    rows = [
        {"entries": entries, "questions": count, **_measured(entries, count)}
        for entries in ENTRIES
        for count in QUESTIONS
    ]
    write_rows(given.out, f"{NEIGHBOURS} nearest of some keys, {KEY_SIZE} features", rows)
    for row in rows:
        print("{entries:>8} {questions:>4}  {faiss_sec:.4f}  {torch_sec:.4f}".format(**row))


def _measured(entries: int, count: int) -> dict[str, float]:
    keys, questions = (normalize(torch.randn(n, KEY_SIZE), dim=-1) for n in (entries, count))
    flat = faiss.IndexFlatIP(KEY_SIZE)
    flat.add(keys.numpy())  # pyright: ignore[reportCallIssue]
    ways = {
        "faiss_sec": lambda: flat.search(questions.numpy(), NEIGHBOURS),  # pyright: ignore
        "torch_sec": lambda: nearest_keys(keys, questions, NEIGHBOURS),
    }
    return medians_sec(ways, REPETITIONS)


if __name__ == "__main__":
    main()
