"""A quantised host in llama.cpp against the same file dequantised in torch: agreement and speed.

    python -m bench.llamacpp_host --model FILE.gguf --adapter FOLDER --text FILE --out RESULT.json

Agreement is over one text: log-probabilities of all tokens at every place, and what the text costs.
Speeds are of one prompt; the ways take turns in each repetition, and a figure is the median over
repetitions: by the clock, and by processor time, which other work on the machine touches less.
"""

import argparse
import statistics
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bench.cost.cpu_flops import processor
from trimtab.backends.hf import HFModel
from trimtab.backends.open import open_model
from trimtab.config import MountConfig
from trimtab.mount import mount
from trimtab.steering.mounted import Mounted
from trimtab.steering.processor import steered
from trimtab.store.files import package_versions, write_json

WAYS = {"llama.cpp": "llamacpp:", "torch": ""}


@torch.no_grad()
def agreement(ours: HFModel, theirs: HFModel, ids: list[int]) -> dict[str, Any]:
    """How far the same file's two arithmetics are apart on a text."""
    tokens = torch.tensor([[*ours.context_ids(), *ids]])
    read = ours.read(tokens)
    assert read.logits is not None
    own, states = read.logits[0], theirs.hidden(tokens)[0]
    copied = ours.unembedding.logits(read.hidden[0])
    logits = theirs.unembedding.logits(states)
    said, expected = own.log_softmax(-1), logits.log_softmax(-1)
    kl = (expected.exp() * (expected - said)).sum(-1)
    cosines = torch.nn.functional.cosine_similarity(read.hidden[0], states, dim=-1)
    return {
        "tokens": tokens.shape[1],
        "mean_logprob_difference_nats": float((said - expected).abs().mean()),
        "largest_logprob_difference_nats": float((said - expected).abs().max()),
        "mean_kl_nats": float(kl.mean()),
        "same_top_token": float((own.argmax(-1) == logits.argmax(-1)).float().mean()),
        "smallest_cosine_of_states": float(cosines.min()),
        "nats_per_token": {"llama.cpp": paid(said, tokens), "torch": paid(expected, tokens)},
        "dequantised_head_of_engine_states": {
            "largest_logit_difference": float((copied - own).abs().max()),
            "as_share_of_largest_logit": float((copied - own).abs().max() / own.abs().max()),
            "mean_logprob_difference_nats": float((copied.log_softmax(-1) - said).abs().mean()),
        },
    }


def paid(logprobs: Tensor, tokens: Tensor) -> float:
    """Nats a token for all but the first."""
    return -float(logprobs[:-1].gather(1, tokens[0, 1:, None]).mean())


class Spent(NamedTuple):
    """Time spent, by the clock and of the processor."""

    wall_sec: float
    cpu_sec: float

    @staticmethod
    def now() -> "Spent":
        """Since some moment."""
        return Spent(time.perf_counter(), time.process_time())

    def less(self, other: "Spent", parts: int = 1) -> "Spent":
        """What was spent since another moment, or above another time, for each of some parts."""
        return Spent(*((a - b) / parts for a, b in zip(self, other, strict=True)))


def read_sec(host: HFModel, ids: list[int]) -> Spent:
    """Time to read a token of a text, all its hidden states included."""
    started = Spent.now()
    with torch.inference_mode():
        host.hidden(torch.tensor([[*host.context_ids(), *ids]]))
    return Spent.now().less(started, len(ids))


def token_sec(host: HFModel, prompt: list[int], tokens: int) -> tuple[Spent, list[int]]:
    """Time a token of a greedy continuation, its first one and the prompt taken off; and it."""
    spent, written = [], []
    for limit in (1, tokens):
        started = Spent.now()
        found: Any = host.model.generate(
            **host.padded([prompt]), max_new_tokens=limit, min_new_tokens=limit, do_sample=False
        )  # pyright: ignore[reportCallIssue]
        spent.append(Spent.now().less(started))
        written = found[0, len(prompt) :].tolist()
    return spent[1].less(spent[0], tokens - 1), written


def seats(hosts: dict[str, HFModel], adapter: Path | None) -> dict[str, Mounted]:
    """The adapter on each host, seated by the vocabulary alone: that costs no pass and steers."""
    if adapter is None:
        return {}
    asked = {"adapter": adapter, "carriers": ("head", "memory"), "moments": False, "cache": False}
    return {
        way: mount(MountConfig.model_validate({**asked, "host": host.ref}), host=host)
        for way, host in hosts.items()
    }


def same_start(ours: list[int], theirs: list[int]) -> int:
    """Tokens that two continuations begin alike with."""
    pairs = enumerate(zip(ours, theirs, strict=True))
    return next((place for place, (one, other) in pairs if one != other), len(ours))


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--adapter", type=Path)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--text-tokens", type=int, default=192)
    parser.add_argument("--prompt-tokens", type=int, default=48)
    parser.add_argument("--repetitions", type=int, default=3)
    given = parser.parse_args()
    hosts, opening_sec = {}, {}
    for way, scheme in WAYS.items():
        # The first opening unpacks.
        for _ in range(2):
            started = time.perf_counter()
            hosts[way] = open_model(f"{scheme}{given.model}", dtype="float32", engines=True)
            opening_sec[way] = time.perf_counter() - started
    host = hosts["torch"]
    ids = host.encode(given.text.read_text(encoding="utf-8"))[: given.text_tokens]
    prompt = [*host.context_ids(), *ids[: given.prompt_tokens]]
    mounted = seats(hosts, given.adapter)
    steerings = ["bare", *(["head and memory"] if mounted else [])]
    written: dict[str, dict[str, list[int]]] = {name: {} for name in steerings}
    times: dict[str, dict[str, list[Spent]]] = {way: {} for way in WAYS}
    for _ in range(given.repetitions):
        for way, one in hosts.items():
            times[way].setdefault("reading", []).append(read_sec(one, ids))
            for name in steerings:
                with steered(one, mounted[way]) if name != "bare" else nullcontext():
                    spent, written[name][way] = token_sec(one, prompt, given.tokens)
                times[way].setdefault(name, []).append(spent)
                print(f"{way}, {name}: {1 / spent.cpu_sec:.1f} tokens/CPU s", flush=True)
    speeds = {
        clock: {
            way: {
                name: 1 / statistics.median(getattr(spent, clock) for spent in found)
                for name, found in each.items()
            }
            for way, each in times.items()
        }
        for clock in Spent._fields
    }
    result = {
        "model": given.model.parent.name,
        "agreement": agreement(hosts["llama.cpp"], host, ids),
        "opening_sec": opening_sec,
        "tokens_per_sec": speeds,
        "sec_per_token": {
            way: {name: [spent._asdict() for spent in found] for name, found in each.items()}
            for way, each in times.items()
        },
        "same_tokens": {name: same_start(*found.values()) for name, found in written.items()},
        "tokens": given.tokens,
        "prompt_tokens": given.prompt_tokens,
        "threads": torch.get_num_threads(),
        "processor": processor(),
        "versions": package_versions(),
    }
    write_json(given.out, result)


if __name__ == "__main__":
    main()
