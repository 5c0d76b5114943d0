"""Throughput of a server at several requests at once, against one by one, and against steered ones.

    python -m bench.serve_throughput --host MODEL --out RESULT.json [--adapter FOLDER]

Requests go over HTTP to a server of this process. Each asks for the same number of tokens, greedy,
with the end token banned; prompts differ in length. Ways take turns in each repetition, so that
what else the machine does meets them alike. Figures are tokens a second: the median over
repetitions, and the lowest and highest one; and the same by the processor time of server and
client together, which other work on the machine touches less. With an adapter the same requests
are steered by its carriers, so many at once, and compared with the bare host's at once: as they
are, and without the time until each has one token, which grows with prompts and not with answers.
"""

import argparse
import statistics
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import torch

from bench.cost.cpu_flops import processor
from trimtab.backends.hf import HFModel
from trimtab.backends.open import open_model
from trimtab.config import CarrierName, ServeConfig
from trimtab.serving.run import Running, running
from trimtab.store.files import package_versions, write_json
from trimtab.store.manifest import read_manifest

PROMPT = "A trim tab is the small rudder on the edge of a large one, which turns the whole ship. "
WAIT_SEC = 3600.0
ADAPTER = "adapter"
CARRIERS: tuple[tuple[CarrierName, ...], ...] = (
    ("head",),
    ("head", "memory"),
    ("expert",),
    ("head", "memory", "expert"),
)


def prompts(count: int) -> list[str]:
    """Prompts of different lengths."""
    return [f"{number}. " + PROMPT * (1 + number % 4) for number in range(count)]


@dataclass(frozen=True)
class Way:
    """How requests are asked.

    Attributes:
        name: What the result calls it.
        at_once: How many are in flight.
        carriers: What steers them; none for the bare host.
    """

    name: str
    at_once: int
    carriers: tuple[CarrierName, ...] = ()

    def body(self, host: HFModel, prompt: str, tokens: int) -> dict[str, Any]:
        """A request."""
        body: dict[str, Any] = {"model": "host", "prompt": prompt, "max_tokens": tokens}
        if self.carriers:
            body |= {"model": f"host+{ADAPTER}", "trimtab": {"carriers": self.carriers}}
        return body | {"temperature": 0, "logit_bias": {str(i): -100 for i in host.end_ids}}


def ask(client: httpx2.Client, body: Mapping[str, Any]) -> str:
    """One request."""
    found = client.post("/v1/completions", json=body).raise_for_status().json()
    assert found["usage"]["completion_tokens"] == body["max_tokens"]
    return found["choices"][0]["text"]


def timed(server: Running, way: Way, bodies: Sequence[Mapping[str, Any]]):
    """Seconds, processor seconds and texts of all requests."""
    with (
        httpx2.Client(base_url=server.base_url, timeout=WAIT_SEC) as client,
        ThreadPoolExecutor(way.at_once) as pool,
    ):
        start_sec, start_cpu_sec = time.perf_counter(), time.process_time()
        texts = list(pool.map(lambda body: ask(client, body), bodies))
        cpu_sec = time.process_time() - start_cpu_sec
        return time.perf_counter() - start_sec, cpu_sec, texts


def summary(times_sec: Sequence[float], tokens: int) -> dict[str, Any]:
    """Tokens a second."""
    rates = sorted(tokens / sec for sec in times_sec)
    found = {"median": statistics.median(rates), "lowest": rates[0], "highest": rates[-1]}
    return {"tokens_per_sec": found, "sec": list(times_sec)}


def ratio(first_sec: Sequence[float], second_sec: Sequence[float]) -> dict[str, Any]:
    """What the first takes over what the second does, in each repetition."""
    each = [one / other for one, other in zip(first_sec, second_sec, strict=True)]
    return {"median": statistics.median(each), "each": each}


def ratios(times_sec: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    """How many times as fast at once is as one by one; and what steering costs, where there is."""
    alone, together, *steered = times_sec
    found = {"ratio": ratio(times_sec[alone], times_sec[together])}
    if steered:
        found["cost"] = {name: ratio(times_sec[name], times_sec[together]) for name in steered}
    return found


def token_costs(
    times_sec: Mapping[str, Sequence[float]], firsts_sec: Mapping[str, Sequence[float]]
):
    """What steering costs after the first tokens, in each repetition."""
    _, together, *steered = times_sec
    after = {
        name: [
            all_sec - first_sec for all_sec, first_sec in zip(found, firsts_sec[name], strict=True)
        ]
        for name, found in times_sec.items()
    }
    return {name: ratio(after[name], after[together]) for name in steered}


def arguments() -> argparse.Namespace:
    """From the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--host", required=True)
    parser.add_argument("--adapter", type=Path)
    names = ["+".join(carriers) for carriers in CARRIERS]
    parser.add_argument("--carriers", nargs="*", choices=names, default=names)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--at-once", type=int, default=8)
    parser.add_argument("--requests", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    return parser.parse_args()


def ways_of(given: argparse.Namespace) -> list[Way]:
    """One by one and at once, bare; and at once by each set of carriers of the adapter."""
    many = given.at_once
    ways = [Way("one by one", 1), Way(f"{many} at once", many)]
    if given.adapter is not None:
        carried = read_manifest(given.adapter).carriers
        asked = [carriers for carriers in CARRIERS if "+".join(carriers) in given.carriers]
        steered = [carriers for carriers in asked if {*carriers} <= {*carried}]
        ways += [Way("+".join(carriers), many, carriers) for carriers in steered]
    return ways


def main() -> None:
    """Measure and write."""
    given = arguments()
    ways = ways_of(given)
    config = ServeConfig(
        host=given.host,
        name="host",
        port=0,
        adapter=(f"{ADAPTER}={given.adapter}",) if given.adapter else (),
        carriers=tuple(dict.fromkeys(one for way in ways for one in way.carriers)) or None,
        time_limit_sec=WAIT_SEC,
    )
    host = open_model(given.host, dtype=given.dtype)
    times_sec: dict[str, list[float]] = {way.name: [] for way in ways}
    cpu_times_sec: dict[str, list[float]] = {way.name: [] for way in ways}
    firsts_sec: dict[str, list[float]] = {way.name: [] for way in ways}
    texts: dict[str, list[list[str]]] = {way.name: [] for way in ways}
    with running(config, host=host) as server:
        for way in ways:
            timed(server, way, [way.body(host, one, 2) for one in prompts(way.at_once)])
        for _ in range(given.repetitions):
            for way in ways:
                bodies = [way.body(host, one, 1) for one in prompts(given.requests)]
                firsts_sec[way.name].append(timed(server, way, bodies)[0])
                bodies = [way.body(host, one, given.tokens) for one in prompts(given.requests)]
                sec, cpu_sec, said = timed(server, way, bodies)
                times_sec[way.name].append(sec)
                cpu_times_sec[way.name].append(cpu_sec)
                texts[way.name].append(said)
                print(f"{way.name}: {given.requests * given.tokens / sec:.1f} tokens/s", flush=True)
    total = given.requests * given.tokens
    bare = [said for way in ways if not way.carriers for said in texts[way.name]]
    write_json(
        given.out,
        {
            "host": Path(given.host).parent.name if Path(given.host).exists() else given.host,
            "dtype": given.dtype,
            "requests": given.requests,
            "tokens_each": given.tokens,
            "ways": {name: summary(found, total) for name, found in times_sec.items()},
            "ways_by_cpu": {name: summary(found, total) for name, found in cpu_times_sec.items()},
            **ratios(times_sec),
            **{f"{name}_by_cpu": found for name, found in ratios(cpu_times_sec).items()},
            "first_token_sec": firsts_sec,
            "cost_of_a_token": token_costs(times_sec, firsts_sec),
            "texts_equal": all(one == same[0] for same in (bare, *texts.values()) for one in same),
            "threads": torch.get_num_threads(),
            "processor": processor(),
            "versions": package_versions(),
        },
    )


if __name__ == "__main__":
    main()
