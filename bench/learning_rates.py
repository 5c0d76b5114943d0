r"""Does a short trial tell which learning rate a whole training wants?

    python -m bench.learning_rates --small MODEL ... --domain NAME ... --out RESULT

Each small model learns each domain's training text at every rate that `tune` tries, a trial's
tokens and all of them; what its held-out text costs at its best is written down. The short ones
read excerpts from all over the text and are validated four times, where a trial of `tune` is
validated at its end. Trainings that the transfer suite has done already are taken from there.
"""

import argparse
import os
from pathlib import Path
from typing import Any

from bench.equal_experts import held_out
from bench.transfer.domains import DOMAINS
from bench.transfer.pairs import Pair
from bench.transfer.suite import FOLDER, Run, lay_out_texts
from trimtab.cli_errors import run_program
from trimtab.progress import Display
from trimtab.store.expert import read_expert
from trimtab.store.files import package_versions, write_json
from trimtab.store.home import HOME_VARIABLE
from trimtab.tuning.rates import RATES, TRIAL_TOKENS


def at_rate(run: Run, rate: float, *, is_short: bool, display: Display) -> dict[str, Any]:
    """What held-out text costs after a training at a rate, of a trial's tokens or of all."""
    small = run.pair.small
    if is_short:
        out = run.folder / "trials" / f"{rate:g}"
        expert = run.tuned(small, out, display, learning_rate=rate, max_tokens=TRIAL_TOKENS)
    else:
        expert = run.lora(small, display, rate)
    found = held_out(expert)
    return {
        "model": small,
        "domain": run.domain,
        "learning_rate": rate,
        "train_tokens": read_expert(expert, verify=False).train_tokens,
        "held_out_bits_per_byte_untuned": found.bits_per_byte_before,
        "held_out_bits_per_byte": found.bits_per_byte_after,
    }


def measure(given: argparse.Namespace) -> None:
    """Train everything that is not trained yet, and write the file anew after each model."""
    display, rows = Display(), []
    for domain in given.domain:
        for small in given.small:
            run = Run(Pair("rates", small, small), domain, given.seed, given.folder, test_tokens=0)
            lay_out_texts(run)
            for is_short in (True, False)[: 1 if given.short else 2]:
                rows += [at_rate(run, r, is_short=is_short, display=display) for r in RATES]
            what = (__doc__ or "").split("\n")[0]
            found = {"schema": 1, "what": what, "seed": given.seed, "trainings": rows}
            write_json(given.out, found | {"packages": package_versions()})


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--small", required=True, nargs="+", help="small models")
    parser.add_argument("--domain", required=True, nargs="+", choices=list(DOMAINS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--short", action="store_true", help="trials alone")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="the transfer suite's")
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    os.environ.setdefault(HOME_VARIABLE, "build/cache")
    run_program(lambda: measure(given))


if __name__ == "__main__":
    main()
