"""Time a token with the expert beside a host, each in llama.cpp or in torch.

    python -m bench.llamacpp_pair --host FILE.gguf --small FILE.gguf --adapter FOLDER \
        --text FILE --out RESULT.json

Greedy continuations of one prompt with the live blend, no drafts, and the bare host's. The ways
take turns in each repetition; a figure is the median over repetitions by the clock.
"""

import argparse
import statistics
from pathlib import Path
from typing import Any

import torch

from bench.cost.cpu_flops import processor
from bench.llamacpp_host import WAYS, same_start, token_sec
from trimtab.backends.open import open_model
from trimtab.config import MountConfig
from trimtab.mount import mount
from trimtab.steering.processor import open_live, steered
from trimtab.store.files import package_versions, write_json


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    for name in ("--host", "--small", "--adapter", "--text", "--out"):
        parser.add_argument(name, type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=25)
    parser.add_argument("--prompt-tokens", type=int, default=200)
    parser.add_argument("--repetitions", type=int, default=3)
    given = parser.parse_args()
    hosts = {way: open_model(f"{scheme}{given.host}", engines=True) for way, scheme in WAYS.items()}
    live: dict[tuple[str, str], Any] = {}
    for way, host in hosts.items():
        asked = {"adapter": given.adapter, "carriers": ("expert",), "host": host.ref}
        mounted = mount(MountConfig.model_validate(asked), host=host)
        for small, scheme in WAYS.items():
            found = open_live(mounted, host, small=f"{scheme}{given.small}", draft_tokens=0)
            live[way, small] = (mounted, found)
    any_host = hosts["torch"]
    ids = any_host.encode(given.text.read_text(encoding="utf-8"))[: given.prompt_tokens]
    prompt = [*any_host.context_ids(), *ids]
    times: dict[str, list[float]] = {}
    written: dict[str, list[int]] = {}
    # The first time through, tokens of the host are put into the small models' for the first time.
    for repetition in range(given.repetitions + 1):
        for way, host in hosts.items():
            name = f"host in {way}, bare"
            spent, written[name] = token_sec(host, prompt, given.tokens)
            if repetition:
                times.setdefault(name, []).append(spent.wall_sec)
            for small in WAYS:
                name = f"host in {way}, expert in {small}"
                mounted, found = live[way, small]
                with steered(host, mounted, carriers=("expert",), live=found):
                    spent, written[name] = token_sec(host, prompt, given.tokens)
                if repetition:
                    times.setdefault(name, []).append(spent.wall_sec)
                print(f"{name}: {spent.wall_sec:.3f} s a token", flush=True)
    write_json(
        given.out,
        {
            "what": "seconds a token, by the clock: the host bare, and with the live blend",
            "host": given.host.parent.name,
            "small": given.small.parent.name,
            "median_sec_per_token": {name: statistics.median(t) for name, t in times.items()},
            "sec_per_token": times,
            "same_tokens_as_all_in_torch": {
                name: same_start(found, written["host in torch, expert in torch"])
                for name, found in written.items()
                if "expert" in name
            },
            "tokens": given.tokens,
            "prompt_tokens": len(prompt),
            "threads": torch.get_num_threads(),
            "torch_dtype": str(any_host.model.dtype),
            "processor": processor(),
            "versions": package_versions(),
        },
    )


if __name__ == "__main__":
    main()
