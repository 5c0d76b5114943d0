r"""What appending text to a memory is worth and costs, beside an adapter that is made anew.

    python -m bench.appending --expert FOLDER --first DATA --more DATA --test DATA --host MODEL \
        --folder FOLDER --out RESULT [--entries 1000000]

Three memories of one expert: of the first text; the same with more text appended; and of all text,
recorded and fitted anew. Each is scored on the same test text. With `--entries` the first memory
is also repeated up to so many entries, as in bench.memory_opening, and grows by the same text.
"""

import argparse
import os
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

from bench.memory_opening import grow
from trimtab.append import append
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


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--expert", type=Path, required=True)
    for name in ("first", "more", "test"):
        parser.add_argument(f"--{name}", nargs="+", required=True)
    parser.add_argument("--host", required=True)
    parser.add_argument("--folder", type=Path, required=True, help="for what is made on the way")
    parser.add_argument("--entries", type=int, help="of a memory to grow; none by default")
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    run_program(lambda: measure(given))


def measure(given: argparse.Namespace) -> None:
    if given.folder.is_dir() and any(given.folder.iterdir()):
        raise InputError(
            f"{given.folder} is not empty, and what is there already takes no time",
            hint="name a new folder in --folder",
        )
    os.environ[HOME_VARIABLE] = str((given.folder / "home").resolve())
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
        "packages": package_versions(),
    }
    if given.entries:
        result["large"] = _large(given, smaller, more)
    write_json(given.out, result)
    print(given.out.read_text())


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
