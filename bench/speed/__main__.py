"""Measure Trimtab's speed beside all that it competes with: `python -m bench.speed`.

    python -m bench.speed [--rows ROW ...] [--pair PAIR] [--quick]

Everything is compared with the bare host of the same run, in turns; figures go into
bench/results/speed.json, row by row, so that any row can be measured alone.
"""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import faiss
import torch

from bench.speed.results import Outcome, check_machine, keep, machine
from bench.speed.roofline import Peaks
from bench.speed.rows import DEMO_ROW, DRAFTING, PAIRS, QUICK, ROWS, Settings
from bench.speed.run import Asked, measure
from bench.speed.table import RESULTS, details_path, table
from bench.transfer.domains import TEXTS
from examples.demo import corpus, models
from trimtab.backends.open import resolve_dtype
from trimtab.cli_errors import run_program
from trimtab.errors import InputError
from trimtab.progress import Display

FOLDER = Path("build/speed")


def main(words: Sequence[str] | None = None) -> None:
    """Run the bench; exits with the same statuses as `trimtab`."""
    parser = argparse.ArgumentParser(prog="bench.speed", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rows", nargs="+", metavar="ROW", help=f"of {', '.join(ROWS)} [all]")
    parser.add_argument("--pair", choices=PAIRS, default="qwen", help="models [qwen]")
    parser.add_argument(
        "--tokenizer", type=Path, help="folder of a tokenizer, for pairs of random weights"
    )
    parser.add_argument("--repetitions", type=int, help=f"[{Settings().repetitions}]")
    parser.add_argument("--threads", type=int, help="of torch and faiss [all cores]")
    parser.add_argument("--quick", action="store_true", help="few tokens, to see that all rows run")
    parser.add_argument("--out", type=Path, help=f"results [{RESULTS}; elsewhere for other pairs]")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="what is made and kept")
    parser.add_argument("--fresh", action="store_true", help="begin the results anew")
    parser.add_argument("--table", action="store_true", help="show the results, measure nothing")
    given = parser.parse_args(words)
    run_program(lambda: _run(given))


def _run(given: argparse.Namespace) -> None:
    out = given.out or _default_out(given)
    if given.table:
        print(table(out))
        return
    rows = _rows(given)
    if given.threads:
        torch.set_num_threads(given.threads)
        faiss.omp_set_num_threads(given.threads)
    dtype = resolve_dtype("auto")
    here = machine(Peaks.measured(dtype), str(dtype).removeprefix("torch."))
    if given.fresh:
        out.unlink(missing_ok=True)
        details_path(out).unlink(missing_ok=True)
    check_machine(out, here)
    settings = QUICK if given.quick else Settings()
    if given.repetitions:
        settings = replace(settings, repetitions=given.repetitions)
    pair = replace(PAIRS[given.pair], tokenizer=given.tokenizer)
    asked = Asked(rows, pair, settings, given.folder, Display())

    _say_downloads(asked)

    def note(found: Mapping[str, Outcome]) -> None:
        stay = keep(out, here, found)
        for name, outcome in found.items():
            figure, times = outcome.figure, f"measured {_times(outcome.repetitions)}"
            if name in stay:
                times += f"; the file keeps its own, measured {_times(stay[name])}"
            spread = f"{figure.low:.3g} - {figure.high:.3g}"
            print(f"{name}: {figure.value:.3g} ({spread}), {times}", flush=True)

    measure(asked, note, quick=given.quick)
    print(table(out))


def _times(count: int) -> str:
    return "once" if count == 1 else f"{count} times"


def _say_downloads(asked: Asked) -> None:
    """Name what is fetched, before it is, and whose terms apply."""
    pairs = [asked.pair, *([PAIRS["demo"]] if DEMO_ROW in asked.rows else [])]
    names = dict.fromkeys(name for pair in pairs for name in (pair.small, pair.host))
    wanted = [name for name in names if name in models.MODELS and not models.is_fetched(name)]
    lines = [models.describe(name) for name in wanted]
    if any(pair.text == "zig" for pair in pairs) and not corpus.is_fetched(TEXTS):
        lines.append(f"{corpus.ZIG_DOWNLOAD_MB:>5} MB  {corpus.ZIG_LICENCE}")
    if lines:
        print("This will be downloaded, and none of it is run as code:", *lines, sep="\n")
        print("Who goes on accepts these terms; Ctrl-C stops.", flush=True)


def _default_out(given: argparse.Namespace) -> Path:
    """Figures of other pairs, and quick ones, are not put among the recorded ones."""
    if given.quick:
        return given.folder / f"quick-{given.pair}.json"
    return RESULTS if given.pair == "qwen" else given.folder / f"speed-{given.pair}.json"


def _rows(given: argparse.Namespace) -> list[str]:
    unknown = [name for name in given.rows or () if name not in ROWS]
    if unknown:
        raise InputError(
            f"there is no row {', '.join(unknown)}", hint=f"choose of {', '.join(ROWS)}"
        )
    asked = [name for name in ROWS if name in (given.rows or ROWS)]
    pair = PAIRS[given.pair]
    if pair.is_random:
        return _rows_of_sizes(given, asked)
    if pair.is_one_vocabulary:
        return asked
    if given.rows and "lockstep-proxy" in given.rows:
        raise InputError(
            f"lock-step proxy tuning needs one vocabulary, and the pair {pair.name} has two",
            hint=f"leave it out; the demo's pair has the row {DEMO_ROW}",
        )
    return [name for name in asked if name != "lockstep-proxy"]


def _rows_of_sizes(given: argparse.Namespace, asked: list[str]) -> list[str]:
    if not given.tokenizer or not given.tokenizer.is_dir():
        raise InputError(
            f"the models of the pair {given.pair} have random weights, and no tokenizer",
            hint="name a folder with Qwen2.5's tokenizer.json: --tokenizer FOLDER",
        )
    foretold = [name for name in DRAFTING if name in (given.rows or ())]
    if foretold:
        raise InputError(
            f"random weights say nothing of {', '.join(foretold)}: how well a model drafts decides",
            hint="leave them out, or choose a pair of real models",
        )
    return [name for name in asked if name not in DRAFTING]


if __name__ == "__main__":
    main()
