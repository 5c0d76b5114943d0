r"""What appending text to a memory is worth and costs, beside an adapter that is made anew.

    python -m bench.appending --expert FOLDER --first DATA --more DATA --test DATA --host MODEL \
        --folder FOLDER --out RESULT [--entries 1000000]

Three memories of one expert: of the first text; the same with more text appended; and of all text,
recorded and fitted anew. Each is scored on the same test text. With `--entries` the first memory
is also made so large with drawn entries, as in bench.memory_opening, and grows by the same text.

    python -m bench.appending --adapter FOLDER --more DATA... --host MODEL --folder FOLDER \
        --out RESULT [--entries 1000000] [--threads 1]

How long it takes alone, part by part, for an adapter that is there and for one whose memory is
made as large as `--entries`: each of DATA is appended to either, and the grown adapter is mounted
twice. What the larger memory takes longer is what grows with it. The folder may be used again, for
another version of the code: the large memory and its lists are then there already.
"""

import argparse
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any, TypeVar
from unittest.mock import patch

import faiss
import torch

from bench.memory_opening import grow
from trimtab.append import append
from trimtab.backends.hf import HFModel
from trimtab.backends.open import open_model
from trimtab.cli_errors import run_program
from trimtab.config import (
    AppendConfig,
    EvaluateConfig,
    FitConfig,
    MountConfig,
    RecordConfig,
)
from trimtab.errors import InputError
from trimtab.evaluate import evaluate
from trimtab.fit import fit
from trimtab.mount import mount
from trimtab.progress import Display
from trimtab.record import record
from trimtab.report import read_report
from trimtab.store.files import package_versions, write_json
from trimtab.store.home import HOME_VARIABLE
from trimtab.store.manifest import read_manifest

Made = TypeVar("Made")
ROWS = ("host", "bytes", "state", "memory")
GENERAL_TOKENS = 8_192
LARGE_ENTRIES = 1_000_000

STAGES = {
    "append": {
        "check the adapter's files": "read_manifest",
        "open the small model": "_open_base",
        "sort the text out": "_read_text",
        "read the text": "new_entries",
        "write the memory": "write_memory",
        "fingerprints and manifest": "write_adapter",
    },
    "mount": {
        "check the adapter's files": "read_manifest",
        "seats of the new entries": "grown_seats",
        "keep the seats": "write_seats",
        "lists and byte order": "kept_index",
        "the head's rows": "seat_rows",
    },
}
"""Of a module: what a part of its work is called here, and the function that does it; parts that
a version of the code does not have are left out."""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    made_from = parser.add_mutually_exclusive_group(required=True)
    made_from.add_argument("--expert", type=Path)
    made_from.add_argument("--adapter", type=Path, help="how long it takes alone, to append to it")
    for name in ("first", "test"):
        parser.add_argument(f"--{name}", nargs="+", help="with --expert")
    parser.add_argument("--more", nargs="+", required=True)
    parser.add_argument("--host", required=True)
    parser.add_argument("--folder", type=Path, required=True, help="for what is made on the way")
    parser.add_argument("--entries", type=int, help="of a memory to grow")
    parser.add_argument("--threads", type=int, default=1, help="with --adapter [1]")
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    if given.expert and not (given.first and given.test):
        parser.error("--expert needs --first and --test")
    run_program(lambda: measure(given))


def measure(given: argparse.Namespace) -> None:
    if given.expert and given.folder.is_dir() and any(given.folder.iterdir()):
        raise InputError(
            f"{given.folder} is not empty, and what is there already takes no time",
            hint="name a new folder in --folder",
        )
    os.environ[HOME_VARIABLE] = str((given.folder / "home").resolve())
    result = _beside_an_expert(given) if given.expert else _how_long(given)
    write_json(given.out, result | {"packages": package_versions()})
    print(given.out.read_text())


def _beside_an_expert(given: argparse.Namespace) -> dict[str, Any]:
    clock, show = _Clock(), Display().progress
    first, more = tuple(given.first), tuple(given.more)
    smaller = clock.lap("record and fit, first text", lambda: _made(given, "first", first))
    anew = clock.lap("record and fit, all text", lambda: _made(given, "all", (*first, *more)))
    grown = given.folder / "grown.adapter"
    added = AppendConfig(adapter=smaller, data=more, out=grown)
    clock.lap("append", lambda: append(added, progress=show))
    scored = {
        name: _scored(given, name, adapter)
        for name, adapter in (("first", smaller), ("grown", grown), ("anew", anew))
    }
    result: dict[str, Any] = {
        "first": list(first),
        "more": list(more),
        "test": given.test,
        "host": given.host,
        "expert": str(given.expert),
        "sec": clock.sec,
        "memories": scored,
    }
    if given.entries:
        result["large"] = _large(given, smaller, more)
    return result


def _made(given: argparse.Namespace, name: str, data: tuple[str, ...]) -> Path:
    show, recording = Display().progress, given.folder / f"{name}.recording"
    record(
        RecordConfig(expert=given.expert, out=recording, data=data, general_tokens=GENERAL_TOKENS),
        progress=show,
    )
    out = given.folder / f"{name}.adapter"
    fit(FitConfig(recording=recording, out=out, carriers=("memory",)), progress=show)
    return out


def _scored(given: argparse.Namespace, name: str, adapter: Path) -> dict[str, Any]:
    config = EvaluateConfig(
        adapter=adapter,
        host=given.host,
        data=tuple(given.test),
        rows=ROWS,
        out=given.folder / f"{name}.report",
    )
    evaluate(config, progress=Display().progress)
    (host,) = read_report(config.out / "report.json").hosts
    memory = read_manifest(adapter).memory
    assert memory is not None
    return {
        "entries": memory.entries,
        "bits_per_byte": {row: asdict(value) for row, value in host.domain.items()},
        "against_host": {row: asdict(value) for row, value in host.domain_change.items()},
    }


def _large(given: argparse.Namespace, adapter: Path, more: tuple[str, ...]) -> dict[str, Any]:
    """A memory of many entries, seated before and after it has grown."""
    large, out = given.folder / "large.adapter", given.folder / "large-grown.adapter"
    grow(adapter, large, given.entries)
    host, clock = open_model(given.host), _Clock()

    def seat(folder: Path) -> Callable[[], object]:
        return lambda: mount(MountConfig(adapter=folder, host=given.host), host=host)

    clock.lap("first mount", seat(large))
    clock.lap("mount again", seat(large))
    clock.lap("append", lambda: append(AppendConfig(adapter=large, data=more, out=out)))
    clock.lap("mount of the grown memory", seat(out))
    clock.lap("mount of it again", seat(out))
    memory = read_manifest(out).memory
    assert memory is not None
    return {"entries": given.entries, "grown_entries": memory.entries, "sec": clock.sec}


def _how_long(given: argparse.Namespace) -> dict[str, Any]:
    """What appending to a memory takes, and to a large one."""
    torch.set_num_threads(given.threads)
    faiss.omp_set_num_threads(given.threads)
    host, large = open_model(given.host), given.folder / "large.adapter"
    if not large.is_dir():
        grow(given.adapter, large, given.entries or LARGE_ENTRIES)
    return {
        "adapter": str(given.adapter),
        "more": given.more,
        "host": given.host,
        "threads": given.threads,
        "memories": [_steps(given, adapter, host) for adapter in (given.adapter, large)],
    }


def _steps(given: argparse.Namespace, adapter: Path, host: HFModel) -> dict[str, Any]:
    """Each text is appended to the same memory; of each number the median over the texts."""

    def seat(folder: Path) -> dict[str, Any]:
        config = MountConfig(adapter=folder, host=given.host)
        return _taken("mount", lambda: mount(config, host=host))

    seat(adapter)
    runs, out = list[dict[str, Any]](), given.folder / "grown.adapter"
    for data in given.more:
        config = AppendConfig(adapter=adapter, data=(data,), out=out)
        with _forgotten(out, given.folder / "home"):
            taken = {"append": _taken("append", lambda config=config: append(config))}
            runs.append(taken | {"mount": seat(out), "mount again": seat(out)})
    memory = read_manifest(adapter).memory
    assert memory is not None
    return {
        "entries": memory.entries,
        "median": {step: _medians([run[step] for run in runs]) for step in runs[0]},
        "runs": runs,
    }


@contextmanager
def _forgotten(out: Path, home: Path) -> Iterator[None]:
    """An adapter is removed again, and so is what is kept of it."""
    there = set(home.rglob("*"))
    yield
    shutil.rmtree(out)
    for path in set(home.rglob("*")) - there:
        if path.is_file():
            path.unlink()


def _medians(runs: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        part: {kind: median(run[part][kind] for run in runs) for kind in runs[0][part]}
        for part in runs[0]
    }


def _taken(verb: str, work: Callable[[], object]) -> dict[str, dict[str, float]]:
    """Seconds that passed and seconds of the processor: all, and of each part."""
    found: dict[str, dict[str, float]] = {}
    with ExitStack() as stack:
        module = sys.modules[f"trimtab.{verb}"]
        for part, name in STAGES[verb].items():
            if hasattr(module, name):
                whole = _timed(getattr(module, name), found, part)
                stack.enter_context(patch.object(module, name, whole))
        with _timing(found, "all"):
            work()
    return found


def _timed(
    whole: Callable[..., object], found: dict[str, dict[str, float]], part: str
) -> Callable[..., object]:
    def timed(*given: object, **named: object) -> object:
        with _timing(found, part):
            return whole(*given, **named)

    return timed


@contextmanager
def _timing(found: dict[str, dict[str, float]], part: str) -> Iterator[None]:
    begun, cpu = time.perf_counter(), time.process_time()
    yield
    taken = found.setdefault(part, {"sec": 0.0, "cpu_sec": 0.0})
    taken["sec"] += time.perf_counter() - begun
    taken["cpu_sec"] += time.process_time() - cpu


class _Clock:
    """Seconds that pieces of work took."""

    def __init__(self) -> None:
        self.sec: dict[str, float] = {}

    def lap(self, name: str, work: Callable[[], Made]) -> Made:
        begun = time.perf_counter()
        made = work()
        self.sec[name] = time.perf_counter() - begun
        return made


if __name__ == "__main__":
    main()
