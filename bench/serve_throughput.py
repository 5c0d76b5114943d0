"""Throughput of a server at several requests at once, against the same requests one by one.

    python -m bench.serve_throughput --host MODEL --out RESULT.json

Requests go over HTTP to a server of this process. Each asks for the same number of tokens, greedy,
with the end token banned; prompts differ in length. Ways take turns in each repetition, so that
what else the machine does meets them alike. Figures are tokens a second: the median over
repetitions, and the lowest and highest one; and the same by the processor time of server and
client together, which other work on the machine touches less.
"""

import argparse
import statistics
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2
import torch

from bench.cost.cpu_flops import processor
from trimtab.backends.hf import HFModel
from trimtab.backends.open import open_model
from trimtab.config import ServeConfig
from trimtab.serving.run import Running, running
from trimtab.store.files import package_versions, write_json

PROMPT = "A trim tab is the small rudder on the edge of a large one, which turns the whole ship. "
WAIT_SEC = 3600.0


def prompts(count: int) -> list[str]:
    """Prompts of different lengths."""
    return [f"{number}. " + PROMPT * (1 + number % 4) for number in range(count)]


def ask(client: httpx2.Client, host: HFModel, prompt: str, tokens: int) -> str:
    """One request."""
    body: dict[str, Any] = {"model": "host", "prompt": prompt, "max_tokens": tokens}
    body |= {"temperature": 0, "logit_bias": {str(i): -100 for i in host.end_ids}}
    found = client.post("/v1/completions", json=body).raise_for_status().json()
    assert found["usage"]["completion_tokens"] == tokens
    return found["choices"][0]["text"]


def timed(server: Running, host: HFModel, at_once: int, requests: int, tokens: int):
    """Seconds, processor seconds and texts of all requests, so many of them at once."""
    with (
        httpx2.Client(base_url=server.base_url, timeout=WAIT_SEC) as client,
        ThreadPoolExecutor(at_once) as pool,
    ):
        start_sec, start_cpu_sec = time.perf_counter(), time.process_time()
        texts = list(pool.map(lambda one: ask(client, host, one, tokens), prompts(requests)))
        cpu_sec = time.process_time() - start_cpu_sec
        return time.perf_counter() - start_sec, cpu_sec, texts


def summary(times_sec: Sequence[float], tokens: int) -> dict[str, Any]:
    """Tokens a second."""
    rates = sorted(tokens / sec for sec in times_sec)
    found = {"median": statistics.median(rates), "lowest": rates[0], "highest": rates[-1]}
    return {"tokens_per_sec": found, "sec": list(times_sec)}


def ratio(times_sec: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    """How many times as fast the second way is, in each repetition."""
    pairs = zip(*times_sec.values(), strict=True)
    each = [alone_sec / together_sec for alone_sec, together_sec in pairs]
    return {"median": statistics.median(each), "each": each}


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--host", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--at-once", type=int, default=8)
    parser.add_argument("--requests", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    given = parser.parse_args()
    config = ServeConfig(host=given.host, name="host", port=0, time_limit_sec=WAIT_SEC)
    host = open_model(given.host, dtype=given.dtype)
    ways = {"one by one": 1, f"{given.at_once} at once": given.at_once}
    times_sec: dict[str, list[float]] = {name: [] for name in ways}
    cpu_times_sec: dict[str, list[float]] = {name: [] for name in ways}
    texts: list[list[str]] = []
    with running(config, host=host) as server:
        timed(server, host, given.at_once, given.at_once, 2)
        for _ in range(given.repetitions):
            for name, at_once in ways.items():
                sec, cpu_sec, said = timed(server, host, at_once, given.requests, given.tokens)
                times_sec[name].append(sec)
                cpu_times_sec[name].append(cpu_sec)
                texts.append(said)
                print(f"{name}: {given.requests * given.tokens / sec:.1f} tokens/s", flush=True)
    total = given.requests * given.tokens
    write_json(
        given.out,
        {
            "host": Path(given.host).parent.name if Path(given.host).exists() else given.host,
            "dtype": given.dtype,
            "requests": given.requests,
            "tokens_each": given.tokens,
            "ways": {name: summary(found, total) for name, found in times_sec.items()},
            "ways_by_cpu": {name: summary(found, total) for name, found in cpu_times_sec.items()},
            "ratio": ratio(times_sec),
            "ratio_by_cpu": ratio(cpu_times_sec),
            "texts_equal": all(one == texts[0] for one in texts),
            "threads": torch.get_num_threads(),
            "processor": processor(),
            "versions": package_versions(),
        },
    )


if __name__ == "__main__":
    main()
