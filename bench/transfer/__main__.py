"""The transfer suite: `python -m bench.transfer --pair PAIR --domain DOMAIN [--steps ...]`."""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from bench.transfer.domains import DOMAINS
from bench.transfer.pairs import PAIRS, pair_of
from bench.transfer.results import RESULTS, add
from bench.transfer.steps import DEFAULT_STEPS, STEPS
from bench.transfer.suite import FOLDER, Run, prepare
from bench.transfer.table import table
from trimtab.cli_errors import run_program
from trimtab.progress import Display
from trimtab.store.home import HOME_VARIABLE
from trimtab.store.manifest import read_manifest


def main(words: Sequence[str] | None = None) -> None:
    """Run the suite; exits with the same statuses as `trimtab`."""
    parser = argparse.ArgumentParser(prog="bench.transfer", description=__doc__)
    parser.add_argument("--pair", default="qwen-0.5b-1.5b", help=f"of {', '.join(PAIRS)}, or new")
    parser.add_argument("--small", help="small model of a new pair")
    parser.add_argument("--host", help="host of a new pair")
    parser.add_argument("--domain", nargs="+", default=["zig"], choices=list(DOMAINS))
    parser.add_argument("--seed", nargs="+", type=int, default=[0])
    parser.add_argument("--steps", nargs="+", default=DEFAULT_STEPS, choices=list(STEPS))
    parser.add_argument("--view", default="test", help="test, or beginnings of the same texts")
    parser.add_argument("--test-tokens", type=int, default=20_000)
    parser.add_argument("--train-bytes", type=int, help="training text, if not the domain's budget")
    parser.add_argument("--no-general", action="store_true", help="leave general text out")
    parser.add_argument("--folder", type=Path, default=FOLDER)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--table", action="store_true", help="print the results and end")
    given = parser.parse_args(words)
    os.environ.setdefault(HOME_VARIABLE, "build/cache")
    run_program(lambda: _run(given))


def _run(given: argparse.Namespace) -> None:
    if given.table:
        print(table(given.results))
        return
    pair, display = pair_of(given.pair, given.small, given.host), Display()
    for domain in given.domain:
        for seed in given.seed:
            run = Run(
                pair,
                domain,
                seed,
                given.folder,
                given.test_tokens,
                given.view,
                scores_general=not given.no_general,
                train_bytes=given.train_bytes,
            )
            prepare(run, display)
            tokens = read_manifest(run.adapter, verify=False).provenance.tokens
            scored = domain if given.view == "test" else f"{domain}-{given.view}"
            key = {"pair": pair.name, "domain": scored, "seed": seed, "train_tokens": tokens}
            key |= {"small": pair.small, "host": pair.host, "test_tokens": given.test_tokens}
            for step in given.steps:
                print(f"{pair.name}, {domain}, seed {seed}: {step}", flush=True)
                add(key, STEPS[step](run, display), given.results)
    print(table(given.results))


if __name__ == "__main__":
    main()
