"""The translation bench: `python -m bench.translation [--sentences N] [--steps ...]`."""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from bench.translation.run import STEPS, Settings, run
from trimtab.cli_errors import run_program
from trimtab.progress import Display
from trimtab.store.home import HOME_VARIABLE


def main(words: Sequence[str] | None = None) -> None:
    """Run the bench; exits with the same statuses as `trimtab`."""
    parser = argparse.ArgumentParser(prog="bench.translation", description=__doc__)
    parser.add_argument("--small", help="small model (default: SmolLM2-135M-Instruct, fetched)")
    parser.add_argument("--host", help="encoder-decoder (default: Marian en-fr, fetched)")
    parser.add_argument("--sentences", type=int, default=150, help="of each manual")
    parser.add_argument("--translations", type=int, default=150, help="translate the first N")
    parser.add_argument("--train-tokens", type=int, default=40_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--beams", type=int, default=1)
    parser.add_argument("--steps", nargs="+", default=list(STEPS), choices=list(STEPS))
    parser.add_argument("--folder", type=Path, default=Path("build/translation"))
    parser.add_argument("--results", type=Path, default=Path("build/translation/results.json"))
    given = parser.parse_args(words)
    os.environ.setdefault(HOME_VARIABLE, "build/cache")
    run_program(lambda: run(Settings(**vars(given)), Display()))


if __name__ == "__main__":
    main()
