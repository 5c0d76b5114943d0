"""How long whole passes over a few tokens take, with the factors exchanged and as they were.

`python -m bench.few_rows_passes MODEL ... --out FILE`. Passes of models in bfloat16 with 100 tokens
in their caches, and the logits of as many states: by blocks, by one product, and with the factors
exchanged. Ways take turns; medians.
"""

import argparse
from collections.abc import Callable, Mapping
from pathlib import Path
from unittest import mock

import torch
from transformers import DynamicCache

from bench.timed_rows import medians_sec, write_rows
from trimtab import few_rows, unembedding
from trimtab.backends.hf import HFModel
from trimtab.backends.open import open_model

TOKENS = (1, 2, 4, 8)
CONTEXT_TOKENS = 100
REPETITIONS = 15
NONE = range(0)


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("models", nargs="+")
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    rows: list[dict[str, object]] = []
    for ref in given.models:
        model = open_model(ref, dtype="bfloat16")
        for tokens in TOKENS:
            found = {**_passes(model, tokens), **_logits(model, tokens)}
            name = Path(ref).parent.name if Path(ref).exists() else ref
            rows.append({"model": name, "tokens": tokens, **found})
            print(rows[-1], flush=True)
    write_rows(given.out, "medians in milliseconds, bfloat16; see bench/few_rows_passes.py", rows)


@torch.inference_mode()
def _passes(model: HFModel, tokens: int) -> dict[str, float]:
    base = model.model.base_model
    cache = DynamicCache(config=model.model.config)
    base(torch.arange(100, 100 + CONTEXT_TOKENS)[None], past_key_values=cache, use_cache=True)
    ids = torch.arange(300, 300 + tokens)[None]

    def run() -> None:
        base(ids, past_key_values=cache, use_cache=True)
        cache.crop(-tokens)

    def plain() -> None:
        with mock.patch.object(few_rows, "_few", lambda _: NONE):
            run()

    return _medians_ms({"pass_plain": plain, "pass_exchanged": run})


@torch.inference_mode()
def _logits(model: HFModel, tokens: int) -> dict[str, float]:
    states = torch.randn(tokens, model.unembedding.weight.shape[1]).bfloat16()

    def by(is_exchanged: bool, in_blocks: bool) -> None:
        kept, kind = few_rows._few, unembedding.Unembedding
        few = kept if is_exchanged else lambda _: NONE
        with (
            mock.patch.object(few_rows, "_few", few),
            mock.patch.object(kind, "_is_for_blocks", lambda *_: in_blocks),
        ):
            model.unembedding.logits(states)

    ways = {
        "logits_by_blocks": lambda: by(False, True),
        "logits_by_one_product": lambda: by(False, False),
        "logits_exchanged": lambda: by(True, False),
    }
    return _medians_ms(ways)


def _medians_ms(ways: Mapping[str, Callable[[], None]]) -> dict[str, float]:
    return {name: round(1e3 * sec, 2) for name, sec in medians_sec(ways, REPETITIONS).items()}


if __name__ == "__main__":
    main()
