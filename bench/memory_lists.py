r"""What the search by lists misses, and what it takes, beside the exact search.

    python -m bench.memory_lists --adapter FOLDER --host MODEL --small MODEL --texts FOLDER \\
        --asked FOLDER --out RESULT.json

Keys are real: the small model's states on the source files of a folder, whitened as the adapter's
memory whitens them. Questions are real: what the host's states are read as on other files, and the
small model's own states there. The mass that is found is the share of the exact search's weights
that lies on entries which the lists find too.
"""

import argparse
import random
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import faiss
import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from trimtab.backends.hf import HFModel
from trimtab.backends.open import open_model
from trimtab.carriers.recall import MountedMemory
from trimtab.carriers.search import NEIGHBOURS, TEMPERATURE, listed_keys, nearest_keys
from trimtab.cli_errors import run_program
from trimtab.config import MountConfig
from trimtab.errors import AdapterError
from trimtab.mount import mount
from trimtab.progress import Display
from trimtab.store.files import package_versions, write_json

WINDOW_TOKENS = 512
FILE_TOKENS = 16_384
SINGLE = 100
"""Questions that are asked one by one."""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--adapter", type=Path, required=True)
    parser.add_argument("--host", required=True)
    parser.add_argument("--small", required=True)
    parser.add_argument("--texts", type=Path, required=True, help="files to make keys of")
    parser.add_argument("--asked", type=Path, required=True, help="files to ask from")
    parser.add_argument("--tokens", type=int, default=160_000, help="keys [160000]")
    parser.add_argument("--every", type=int, default=8, help="one of so many positions asks [8]")
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    run_program(lambda: measure(given))


def measure(given: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    faiss.omp_set_num_threads(1)
    display = Display()
    host, small = (open_model(ref, dtype="float32") for ref in (given.host, given.small))
    memory = mount(MountConfig(adapter=given.adapter, host=given.host), host=host).memory
    if memory is None:
        raise AdapterError(f"{given.adapter} carries no memory", hint="fit one with a memory")
    files = sorted(given.texts.rglob("*.zig"))
    random.Random(0).shuffle(files)
    with display.progress("reading (tokens)", given.tokens) as advance:
        parts, count = [], 0
        for states in _states(small, files):
            parts.append(normalize(memory.memory.features(states), dim=-1).half())
            count += len(states)
            advance(len(states))
            if count >= given.tokens:
                break
    keys = torch.cat(parts)[: given.tokens]
    asked = sorted(given.asked.rglob("*.zig"))
    questions = {
        "read from the host": _questions(memory, _states(host, asked), given.every),
        "the small model's own": _questions(memory, _states(small, asked), given.every, own=True),
    }
    started = time.perf_counter()
    lists = listed_keys(keys)
    build_sec = {"lists": time.perf_counter() - started}
    result = {
        "keys": list(keys.shape),
        "lists": lists.nlist,
        "threads": 1,
        "build_sec": build_sec,
        "ways": {
            name: _compared(keys.float(), lists, each.numpy()) | {"questions": len(each)}
            for name, each in questions.items()
        },
        "packages": package_versions(),
    }
    write_json(given.out, result)
    print(given.out.read_text())


def _states(model: HFModel, files: Iterable[Path]) -> Iterator[Tensor]:
    """Final states of texts, a window at a time."""
    context = model.context_ids()
    for path in files:
        ids = model.encode(path.read_text(errors="ignore"))[:FILE_TOKENS]
        for start in range(0, len(ids), WINDOW_TOKENS):
            read = torch.tensor([[*context, *ids[start : start + WINDOW_TOKENS]]])
            with torch.inference_mode():
                yield model.hidden(read)[0, len(context) :].float()


def _questions(
    memory: MountedMemory, states: Iterator[Tensor], every: int, *, own: bool = False
) -> Tensor:
    read = memory.memory.features if own else memory.reading
    return normalize(torch.cat([read(part) for part in states])[::every], dim=-1).contiguous()


def _compared(keys: Tensor, lists: faiss.IndexIVF, questions: np.ndarray) -> dict[str, object]:
    nearest, cosines = nearest_keys(keys, torch.from_numpy(questions), NEIGHBOURS)
    shares = (cosines / TEMPERATURE).softmax(-1)
    exact_ms = _milliseconds(
        lambda one: nearest_keys(keys, torch.from_numpy(one), NEIGHBOURS), questions
    )
    found: dict[str, object] = {"exact_ms": exact_ms}
    each = []
    for probes in sorted({lists.nlist // share for share in (32, 16, 8, 4)}):
        lists.nprobe = probes
        entries = lists.search(questions, NEIGHBOURS)[1]  # pyright: ignore[reportCallIssue]
        again = [np.isin(*pair) for pair in zip(nearest.numpy(), entries, strict=True)]
        is_found = torch.from_numpy(np.stack(again))
        each.append(
            {
                "probes": probes,
                "mass": float((shares * is_found).sum(1).mean()),
                "nearest": float(is_found[:, 0].float().mean()),
                "ms": _milliseconds(lambda one: lists.search(one, NEIGHBOURS), questions),
            }
        )
    return found | {"lists": each}


def _milliseconds(search: Callable[[np.ndarray], object], questions: np.ndarray) -> float:
    """Of a question that is asked alone, as in a generation."""
    single = [questions[n : n + 1] for n in range(min(SINGLE, len(questions)))]
    started = time.perf_counter()
    for question in single:
        search(question)
    return 1e3 * (time.perf_counter() - started) / len(single)


if __name__ == "__main__":
    main()
