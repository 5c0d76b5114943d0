"""How long expert and reference take to read one more token: a pass of each, or one for both.

`python -m bench.pair_passes --expert FOLDER --out FILE`. Both ways take turns, token by token.
"""

import argparse
import statistics
import time
from collections.abc import Sequence
from pathlib import Path

from bench.timed_rows import write_rows
from trimtab.backends.pair import Pair, open_pair
from trimtab.backends.pair_passes import run_pair
from trimtab.backends.reading import PairCaches
from trimtab.backends.token_tree import TokenTree

CONTEXT_TOKENS, TOKENS = 200, 32
WAYS = {"a pass of each": False, "one pass": True}


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--expert", type=Path, nargs="+", required=True)
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    rows = [row for folder in given.expert for row in _rows(folder)]
    write_rows(
        given.out,
        f"seconds for a token of both models after {CONTEXT_TOKENS} tokens and more,"
        " up to the hidden states",
        rows,
    )
    for row in rows:
        print("{model}  {way}: {median_sec:.4f} ({low_sec:.4f} - {high_sec:.4f})".format(**row))


def _rows(folder: Path) -> list[dict[str, object]]:
    pair = open_pair(folder)
    taken = {way: list[float]() for way in WAYS}
    caches = {way: PairCaches() for way in WAYS}
    line = list(range(100, 100 + CONTEXT_TOKENS))
    for token in range(TOKENS):
        line.append(500 + token)
        for way, together in WAYS.items():
            pair.serves_both = together
            taken[way].append(_timed(pair, line, caches[way]))
    return [
        {
            "model": Path(pair.reference.ref).parent.name,
            "way": way,
            # The first reads the whole context.
            "median_sec": statistics.median(seconds[1:]),
            "low_sec": min(seconds[1:]),
            "high_sec": max(seconds[1:]),
        }
        for way, seconds in taken.items()
    ]


def _timed(pair: Pair, line: Sequence[int], caches: PairCaches) -> float:
    tree = TokenTree()
    tree.add(line)
    began_sec = time.perf_counter()
    run_pair(pair, [(tree, caches)])
    return time.perf_counter() - began_sec


if __name__ == "__main__":
    main()
