r"""What it takes to open a large memory, and to ask it: made anew in RAM, or kept and mapped.

    python -m bench.memory_opening --adapter FOLDER --entries 1000000 --folder FOLDER --out RESULT
        [--host MODEL]

The adapter gives its token strings, of which the text is drawn, so that hardly two entries are
followed by the same bytes, and the form of its keys; the keys themselves are drawn, in
groups. With `--host` the first mount's look at what followed each entry is measured with that
host's tokenizer, and the adapter itself is mounted as well. Each
measurement is in a process of its own. RAM is what a process adds to what it had before: its own,
and pages of mapped files, which the system can take back at any time.
"""

import argparse
import multiprocessing
import os
import shutil
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import faiss
import torch
from torch import Tensor
from torch.nn.functional import normalize

from trimtab.backends.open import open_model
from trimtab.carriers.memory import Memory, contexts_before, lay_out
from trimtab.carriers.search import MAPPED_MATCH_WEIGHT, build_index, look_up
from trimtab.carriers.sources import Sources
from trimtab.cli_errors import run_program
from trimtab.config import MountConfig
from trimtab.errors import AdapterError
from trimtab.mount import mount
from trimtab.steering.seat import following
from trimtab.store.adapter import (
    HEAD_FILE,
    MEMORY_FILE,
    MOUNT_FILE,
    MemoryFile,
    read_memory,
    read_mount,
    write_memory,
)
from trimtab.store.card import write_adapter
from trimtab.store.checked import SETTLED_SEC
from trimtab.store.files import package_versions, replace_directory, write_json
from trimtab.store.home import HOME_VARIABLE
from trimtab.store.index import index_path, kept_index
from trimtab.store.manifest import read_manifest
from trimtab.types import silent

GROUPS = 20_000
SPREAD = 1.0
"""Length of what is added to a group's unit vector."""

QUESTIONS = 64
DRAWN = 65_536


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--adapter", type=Path, required=True)
    parser.add_argument("--host", help="mount there, too")
    parser.add_argument("--entries", type=int, default=1_000_000, help="keys [1000000]")
    parser.add_argument("--folder", type=Path, required=True, help="for large files")
    parser.add_argument("--threads", type=int, default=1, help="[1]")
    parser.add_argument("--no-ram", action="store_true", help="leave out the index in RAM")
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    run_program(lambda: measure(given))


def measure(given: argparse.Namespace) -> None:
    os.environ[HOME_VARIABLE] = str(given.folder / "home")
    # Of tokenizers.
    os.environ["RAYON_NUM_THREADS"] = str(given.threads)
    grown = given.folder / f"memory-{given.entries}-drawn.adapter"
    if not grown.is_dir():
        grow(given.adapter, grown, given.entries)
        # A file must have lain still for this long to be kept in mind.
        time.sleep(2 * SETTLED_SEC)
    _index_file(grown).unlink(missing_ok=True)
    steps: dict[str, Callable[[], dict[str, Any]]] = {
        "made and kept": partial(open_memory, grown, is_kept=True),
        "kept": partial(open_memory, grown, is_kept=True),
    }
    if not given.no_ram:
        steps = {"in RAM": partial(open_memory, grown, is_kept=False)} | steps
    if given.host:
        steps |= {
            "what followed": partial(look_at_followed, grown, given.host),
            "mount, index made": partial(mounted, given.adapter, given.host, is_kept=False),
            "mount, kept": partial(mounted, given.adapter, given.host, is_kept=True),
        }
    result: dict[str, Any] = {
        "entries": given.entries,
        "threads": given.threads,
        "disk_bytes": {"memory": (grown / MEMORY_FILE).stat().st_size},
        "steps": {name: alone(step, given.threads) for name, step in steps.items()},
        "packages": package_versions(),
    }
    result["disk_bytes"]["index"] = _index_file(grown).stat().st_size
    write_json(given.out, result)
    print(given.out.read_text())


def grow(adapter: Path, out: Path, entries: int) -> None:
    """An adapter of which the memory is large."""
    manifest = read_manifest(adapter)
    carried = manifest.memory
    if carried is None or carried.values != "hard":
        raise AdapterError(f"{adapter} carries no hard memory", hint="fit one with a memory")
    file = read_memory(adapter, manifest)
    document, ends = drawn_text(read_mount(adapter)[0].strings, entries)
    text, starts = lay_out([document])
    with replace_directory(out) as folder:
        memory = Memory(
            drawn_keys(folder / "keys", entries, file.memory.keys.shape[1]),
            file.memory.projection,
            file.memory.mean,
            text,
            starts[0] + ends,
            sources=Sources(("text",), tuple(starts)),
        )
        write_memory(folder, MemoryFile(memory, file.probe_features))
        (folder / "keys").unlink()
        for name in (HEAD_FILE, MOUNT_FILE):
            if (adapter / name).is_file():
                shutil.copyfile(adapter / name, folder / name)
        carriers = {name: c for name, c in manifest.carriers.items() if name in ("head", "memory")}
        carriers["memory"] = carried.model_copy(update={"entries": entries})
        emptied = {n: c.model_copy(update={"files": ()}) for n, c in carriers.items()}
        write_adapter(folder, manifest.model_copy(update={"carriers": emptied, "files": {}}))


def drawn_text(strings: Sequence[bytes], entries: int) -> tuple[bytes, Tensor]:
    """Token strings in any order, one more than entries, and where each but the last ends."""
    # Zero bytes part documents.
    chosen = [string for string in strings if string and b"\0" not in string]
    generator = torch.Generator().manual_seed(3)
    drawn = torch.randint(len(chosen), (entries + 1,), generator=generator)
    lengths = torch.tensor([len(string) for string in chosen])[drawn]
    return b"".join(chosen[number] for number in drawn.tolist()), lengths.cumsum(0)[:-1]


def drawn_keys(scratch: Path, entries: int, size: int) -> Tensor:
    """Unit vectors in groups, as float16, in a mapped file."""
    generator = torch.Generator().manual_seed(0)
    groups = _groups(size)
    values = torch.from_file(
        str(scratch), shared=True, size=entries * size, dtype=torch.float16
    ).view(entries, size)
    for part in values.split(DRAWN):
        chosen = groups[torch.randint(GROUPS, (len(part),), generator=generator)]
        noise = torch.randn(len(part), size, generator=generator) * SPREAD / size**0.5
        part.copy_(normalize(chosen + noise, dim=-1))
    return values


def _groups(size: int) -> Tensor:
    return normalize(torch.randn(GROUPS, size, generator=torch.Generator().manual_seed(1)), dim=-1)


def alone(step: Callable[[], dict[str, Any]], threads: int) -> dict[str, Any]:
    """The result of a step in a process of its own."""
    with multiprocessing.get_context("spawn").Pool(1, _limit, (threads,)) as pool:
        return pool.apply(step)


def _limit(threads: int) -> None:
    torch.set_num_threads(threads)
    faiss.omp_set_num_threads(threads)


def open_memory(adapter: Path, *, is_kept: bool) -> dict[str, Any]:
    """What an opening does with a memory, part by part, and questions to it."""
    before, clock = _ram_mb(), _Clock()
    manifest = read_manifest(adapter, read_again=not is_kept)
    clock.lap("check")
    memory = read_memory(adapter, manifest).memory
    clock.lap("read")
    path = _index_file(adapter) if is_kept else None
    index = kept_index(memory, path, silent) if is_kept else build_index(memory)
    clock.lap("index")
    opened = _ram_mb()
    features, contexts = _questions(memory)
    weight = torch.full((QUESTIONS,), MAPPED_MATCH_WEIGHT)
    ask = partial(look_up, memory, index)
    clock = _Clock(clock.laps)
    ask(features[:1], contexts[:1], weight[:1])
    clock.lap("first question")
    ask(features, contexts, weight)
    clock = _Clock(clock.laps)
    for n in range(QUESTIONS):
        ask(features[n : n + 1], contexts[n : n + 1], weight[n : n + 1])
    clock.lap("questions one by one")
    ask(features, contexts, weight)
    clock.lap("questions at once")
    return {
        "laps": clock.laps,
        "questions": QUESTIONS,
        "ram_mb": {name: opened[name] - before[name] for name in opened},
        "ram_after_questions_mb": {name: _ram_mb()[name] - before[name] for name in opened},
        "largest_ram_mb": _told("VmHWM"),
    }


def _questions(memory: Memory) -> tuple[Tensor, Tensor]:
    size = memory.keys.shape[1]
    chosen = _groups(size)[:: GROUPS // QUESTIONS][:QUESTIONS]
    noise = torch.randn(QUESTIONS, size, generator=torch.Generator().manual_seed(2))
    places = torch.arange(QUESTIONS) * (len(memory) // QUESTIONS) + 7
    return chosen + noise / size**0.5, contexts_before(memory.text, memory.positions[places] - 1)


def look_at_followed(adapter: Path, host: str) -> dict[str, Any]:
    """What a first mount does with each entry: the host's token that begins what followed it."""
    model, memory = open_model(host), read_memory(adapter, read_manifest(adapter)).memory
    # The peak so far is that of the host's opening.
    Path("/proc/self/clear_refs").write_text("5")
    before, before_mb, clock = _ram_mb(), _told("VmRSS"), _Clock()
    following(memory, model)
    clock.lap("what followed")
    after = _ram_mb()
    return {
        "laps": clock.laps,
        "ram_mb": {name: after[name] - before[name] for name in after},
        "largest_ram_mb": _told("VmHWM") - before_mb,
    }


def mounted(adapter: Path, host: str, *, is_kept: bool) -> dict[str, Any]:
    """A mount of which the seats are kept, on a host that is open."""
    model, config = open_model(host), MountConfig(adapter=adapter, host=host)
    if not is_kept:
        mount(config, host=model)
        _index_file(adapter).unlink(missing_ok=True)
    before, clock = _ram_mb(), _Clock()
    seated = mount(config, host=model)
    clock.lap("mount")
    assert seated.memory is not None
    after = _ram_mb()
    return {
        "laps": clock.laps,
        "entries": len(seated.memory.memory),
        "ram_mb": {name: after[name] - before[name] for name in after},
    }


class _Clock:
    """Seconds since the last lap, and the processor's seconds among them."""

    def __init__(self, laps: dict[str, dict[str, float]] | None = None) -> None:
        self.laps: dict[str, dict[str, float]] = laps or {}
        self._last = time.perf_counter(), time.process_time()

    def lap(self, name: str) -> None:
        now = time.perf_counter(), time.process_time()
        self.laps[name] = {"sec": now[0] - self._last[0], "cpu_sec": now[1] - self._last[1]}
        self._last = now


def _index_file(adapter: Path) -> Path:
    return index_path(read_manifest(adapter, verify=False).files[MEMORY_FILE].sha256)


def _ram_mb() -> dict[str, float]:
    return {"own": _told("RssAnon"), "mapped": _told("RssFile")}


def _told(name: str) -> float:
    """What the kernel says of this process, in MB."""
    lines = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[name].split()[0]) / 1024


if __name__ == "__main__":
    main()
