"""A decoding step of a host, with transformers' own attention and with shared keys.

`python -m bench.shared_keys MODEL --out FILE`. Rows are of one text and one length, so that no mask
is needed; of some repetitions, in turns, the fastest counts, since other work can only slow one
down.
"""

import argparse
import time
from pathlib import Path

import torch
from transformers import DynamicCache, PreTrainedModel

from bench.timed_rows import write_rows
from trimtab.backends.attention import share_keys
from trimtab.backends.open import open_model
from trimtab.progress import Display
from trimtab.text.probe import probe_documents

CONTEXTS = (128, 400, 1_000)
ROWS = (1, 8)
REPETITIONS = 24


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("model")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="auto")
    given = parser.parse_args()
    host = open_model(given.model, dtype=given.dtype, progress=Display().progress)
    text = "\n".join(document.text for document in probe_documents())
    ids = host.encode(text[: 16 * max(CONTEXTS)])
    found = []
    for context in CONTEXTS:
        for rows in ROWS:
            tokens = torch.tensor([ids[: context + 1]] * rows)
            usual_sec, shared_sec = _measured(host.model, tokens)
            found.append(
                {
                    "context_tokens": context,
                    "rows": rows,
                    "usual_sec": usual_sec,
                    "shared_sec": shared_sec,
                }
            )
            print(
                "{context_tokens:>6} {rows:>3}  {usual_sec:.4f}  {shared_sec:.4f}".format(
                    **found[-1]
                )
            )
    title = f"{given.model.rpartition('models/')[2]}, one new token a row, {host.model.dtype}"
    write_rows(given.out, title, found)


@torch.no_grad()
def _measured(model: PreTrainedModel, tokens: torch.Tensor) -> tuple[float, float]:
    """Seconds of a step by transformers' own attention, and by ours."""
    cache = DynamicCache(config=model.config)
    model(tokens[:, :-1], past_key_values=cache)
    cache.activate_past_recording()
    best = [float("inf")] * 2
    for repetition in range(2 * REPETITIONS):
        way = repetition % 2
        model.set_attn_implementation("sdpa")
        if way:
            share_keys(model)
        began_sec = time.perf_counter()
        model(tokens[:, -1:], past_key_values=cache)
        best[way] = min(best[way], time.perf_counter() - began_sec)
        cache.crop(-1)
    return best[0], best[1]


if __name__ == "__main__":
    main()
