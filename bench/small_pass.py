"""How long a model takes to read one more token, as it is, compiled, and in smaller numbers.

`python -m bench.small_pass --model MODEL ... --out FILE`. Ways take turns, token by token; a way
that this build of PyTorch lacks is left out and said. Compiling needs a C++ compiler.
"""

import argparse
import statistics
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, StaticCache

from bench.timed_rows import write_rows
from trimtab.backends.open import open_model

CONTEXT_TOKENS, TOKENS, ROOM = 200, 24, 512

Step = Callable[[int], Tensor]
"""Reads the token at a place, after all before it."""


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", nargs="+", required=True)
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    rows = [row for ref in given.model for row in _rows(ref)]
    write_rows(
        given.out,
        f"seconds for a token after {CONTEXT_TOKENS} and more, up to the hidden states;"
        " what making the way took, its first token included; the largest difference of a"
        " state from float32's, over the largest state",
        rows,
    )
    for row in rows:
        print("{model}  {way}: {median_sec:.4f}, made in {made_sec:.1f}".format(**row))


def _rows(ref: str) -> list[dict[str, object]]:
    makers: dict[str, Callable[[], Step]] = {
        "float32": lambda: _growing(_opened(ref)),
        "float32, static cache": lambda: _static(_opened(ref), compiled=False),
        "float32, static cache, compiled": lambda: _static(_opened(ref), compiled=True),
        "bfloat16": lambda: _growing(_opened(ref).bfloat16()),
        "int8, states quantised too (torch.ao, dynamic)": lambda: _growing(_int8(_opened(ref))),
    }
    steps, made, taken = dict[str, Step](), dict[str, float](), dict[str, list[float]]()
    states = dict[str, Tensor]()
    for way, maker in makers.items():
        began_sec = time.perf_counter()
        try:
            steps[way] = maker()
            states[way] = steps[way](CONTEXT_TOKENS).float()
        except (RuntimeError, NotImplementedError, AttributeError) as error:
            print(f"{way}: {type(error).__name__}: {str(error)[:200]}")
            steps.pop(way, None)
            continue
        made[way], taken[way] = time.perf_counter() - began_sec, []
    for place in range(CONTEXT_TOKENS + 1, CONTEXT_TOKENS + 1 + TOKENS):
        for way, step in steps.items():
            began_sec = time.perf_counter()
            step(place)
            taken[way].append(time.perf_counter() - began_sec)
    exact = states["float32"]
    return [
        {
            "model": Path(ref).parent.name,
            "way": way,
            "made_sec": made[way],
            "median_sec": statistics.median(seconds),
            "low_sec": min(seconds),
            "high_sec": max(seconds),
            "difference": float((states[way] - exact).abs().max() / exact.abs().max()),
        }
        for way, seconds in taken.items()
    ]


def _opened(ref: str) -> nn.Module:
    trunk: Any = open_model(ref, dtype="float32").model.base_model
    return trunk


def _int8(trunk: nn.Module) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for module in trunk.modules():
            vars(module).pop("forward", None)
        return torch.ao.quantization.quantize_dynamic(trunk, {nn.Linear}, dtype=torch.qint8)


def _ids(first: int, count: int) -> Tensor:
    return torch.arange(100 + first, 100 + first + count)[None]


@torch.no_grad()
def _growing(trunk: nn.Module) -> Step:
    config: Any = trunk.config
    cache = DynamicCache(config=config)
    trunk(input_ids=_ids(0, CONTEXT_TOKENS), past_key_values=cache, use_cache=True)
    return partial(_read, trunk, cache)


@torch.no_grad()
def _static(trunk: nn.Module, *, compiled: bool) -> Step:
    config: Any = trunk.config
    cache = StaticCache(config=config, max_cache_len=ROOM)
    trunk(input_ids=_ids(0, CONTEXT_TOKENS), past_key_values=cache, use_cache=True)
    return partial(_read, torch.compile(trunk.forward) if compiled else trunk, cache)


@torch.no_grad()
def _read(read: Callable[..., Any], cache: Any, place: int) -> Tensor:
    return read(
        input_ids=_ids(place, 1),
        position_ids=torch.tensor([[place]]),
        past_key_values=cache,
        use_cache=True,
    ).last_hidden_state


if __name__ == "__main__":
    main()
