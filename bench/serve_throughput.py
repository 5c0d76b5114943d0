"""Throughput of a server at several requests at once, against one by one, and against steered ones.

    python -m bench.serve_throughput --host MODEL --out RESULT.json [--adapter FOLDER]

Requests go over HTTP to a server of this process. Each asks for the same number of tokens, greedy,
with the end token banned; prompts differ in length. Ways take turns in each repetition, so that
what else the machine does meets them alike. Figures are tokens a second: the median over
repetitions, and the lowest and highest one; and the same by the processor time of server and
client together, which other work on the machine touches less. With an adapter the same requests
are steered by its carriers, so many at once, and compared with the bare host's at once: whole
requests, whose time until the first token grows with prompts and not with answers; and by step,
from when all of them have a token until the first has all of its own.
"""

import argparse
import json
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
ALONE = "one by one"
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
        body |= {"temperature": 0, "logit_bias": {str(i): -100 for i in host.end_ids}}
        return body | {"stream": True, "stream_options": {"include_usage": True}}


@dataclass(frozen=True)
class Moment:
    """When something came, and how many steps the server had done by then."""

    sec: float
    steps: int


@dataclass(frozen=True)
class Asked:
    """An answer, and when its first and its last piece came."""

    text: str
    first: Moment
    last: Moment


def ask(client: httpx2.Client, server: Running, body: Mapping[str, Any]) -> Asked:
    """One request."""
    pieces, moments = [], []
    with client.stream("POST", "/v1/completions", json=body) as answer:
        for line in answer.raise_for_status().iter_lines():
            data = line.removeprefix("data: ")
            if data in ("", "[DONE]"):
                continue
            told = json.loads(data)
            if not told["choices"]:
                assert told["usage"]["completion_tokens"] == body["max_tokens"]
                continue
            pieces.append(told["choices"][0]["text"])
            moments.append(Moment(time.perf_counter(), server.service.engine.counts.steps))
    return Asked("".join(pieces), moments[0], moments[-1])


@dataclass(frozen=True)
class Timed:
    """What all requests of a way took.

    Attributes:
        sec: Until all were answered.
        cpu_sec: The same in processor time of server and client.
        first_sec: Until each had its first token, the median.
        step_sec: Of a step in which all of them took part; None where there was none.
        texts: The answers.
    """

    sec: float
    cpu_sec: float
    first_sec: float
    step_sec: float | None
    texts: list[str]


def timed(server: Running, way: Way, bodies: Sequence[Mapping[str, Any]]) -> Timed:
    """Ask all."""
    with (
        httpx2.Client(base_url=server.base_url, timeout=WAIT_SEC) as client,
        ThreadPoolExecutor(way.at_once) as pool,
    ):
        start_sec, start_cpu_sec = time.perf_counter(), time.process_time()
        found = list(pool.map(lambda body: ask(client, server, body), bodies))
        cpu_sec = time.process_time() - start_cpu_sec
        sec = time.perf_counter() - start_sec
    first_sec = statistics.median(one.first.sec for one in found) - start_sec
    begin = max((one.first for one in found), key=lambda moment: moment.sec)
    end = min((one.last for one in found), key=lambda moment: moment.sec)
    steps = end.steps - begin.steps
    step_sec = (end.sec - begin.sec) / steps if steps > 0 else None
    return Timed(sec, cpu_sec, first_sec, step_sec, [one.text for one in found])


def summary(times_sec: Sequence[float], tokens: int) -> dict[str, Any]:
    """Tokens a second."""
    rates = sorted(tokens / sec for sec in times_sec)
    found = {"median": statistics.median(rates), "lowest": rates[0], "highest": rates[-1]}
    return {"tokens_per_sec": found, "sec": list(times_sec)}


def ratio(
    first_sec: Sequence[float | None], second_sec: Sequence[float | None]
) -> dict[str, Any] | None:
    """What the first takes over what the second does, in each repetition that has both."""
    pairs = zip(first_sec, second_sec, strict=True)
    each = [one / other for one, other in pairs if one is not None and other is not None]
    return {"median": statistics.median(each), "each": each} if each else None


def ratios(times_sec: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    """How many times as fast at once is as one by one; and what steering costs, where there is."""
    together, *steered = (name for name in times_sec if name != ALONE)
    found: dict[str, Any] = {}
    if ALONE in times_sec:
        found["ratio"] = ratio(times_sec[ALONE], times_sec[together])
    if steered:
        found["cost"] = costs(times_sec, together, steered)
    return found


def costs(times_sec: Mapping[str, Sequence[float | None]], bare: str, steered: Sequence[str]):
    """What each steered way takes over the bare one."""
    return {name: ratio(times_sec[name], times_sec[bare]) for name in steered}


def arguments() -> argparse.Namespace:
    """From the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--host", required=True)
    parser.add_argument("--adapter", type=Path)
    names = ["+".join(carriers) for carriers in CARRIERS]
    parser.add_argument("--carriers", nargs="*", choices=names, default=names)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--at-once", type=int, default=8)
    parser.add_argument("--not-alone", action="store_true", help="leave out one by one")
    parser.add_argument("--requests", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    return parser.parse_args()


def ways_of(given: argparse.Namespace) -> list[Way]:
    """One by one and at once, bare; and at once by each set of carriers of the adapter."""
    many = given.at_once
    ways = [] if given.not_alone else [Way(ALONE, 1)]
    ways.append(Way(f"{many} at once", many))
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
    measured: dict[str, list[Timed]] = {way.name: [] for way in ways}
    with running(config, host=host) as server:
        for way in ways:
            timed(server, way, [way.body(host, one, 2) for one in prompts(way.at_once)])
        for _ in range(given.repetitions):
            for way in ways:
                bodies = [way.body(host, one, given.tokens) for one in prompts(given.requests)]
                found = timed(server, way, bodies)
                measured[way.name].append(found)
                rate = given.requests * given.tokens / found.sec
                print(f"{way.name}: {rate:.1f} tokens/s, {found.step_sec} s a step", flush=True)
    total = given.requests * given.tokens
    times_sec = {name: [one.sec for one in of_way] for name, of_way in measured.items()}
    cpu_times_sec = {name: [one.cpu_sec for one in of_way] for name, of_way in measured.items()}
    texts = {name: [one.texts for one in of_way] for name, of_way in measured.items()}
    steps_sec = {
        name: [one.step_sec for one in of_way] for name, of_way in measured.items() if name != ALONE
    }
    together, *steered = steps_sec
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
            "median_first_token_sec": {
                name: [one.first_sec for one in measured[name]] for name in steps_sec
            },
            "step_sec": steps_sec,
            "cost_of_a_step": costs(steps_sec, together, steered),
            "texts_equal": all(one == same[0] for same in (bare, *texts.values()) for one in same),
            "threads": torch.get_num_threads(),
            "processor": processor(),
            "versions": package_versions(),
        },
    )


if __name__ == "__main__":
    main()
