"""What steering adds to a server's step, told apart from the host's pass, which swamps it.

    python -m bench.serve_step --host MODEL --adapter FOLDER --out RESULT.json

A step of a server is a pass of the host over its rows, their logits, and then either a softmax (the
bare host) or the adapter. Here the rows of as many prompts make one pass a step, after which all
ways say their distributions of the same logits, in turns that begin with another way each time.
So each step has its pass once, and the ratio of what two ways take does not hang on how much two
passes differ, which on a shared machine is several times what a head takes. Rows, passes and
steering are the server's own; the choice of a token is left out, since all ways pay it.
"""

import argparse
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.cost.cpu_flops import processor
from bench.serve_throughput import ADAPTER, CARRIERS, prompts
from trimtab.backends.chat import prompt_ids
from trimtab.backends.hf import HFModel
from trimtab.backends.open import open_model
from trimtab.config import CarrierName, ServeConfig
from trimtab.serving.adapters import Adapters
from trimtab.serving.batch import Batch
from trimtab.serving.reading import Reading
from trimtab.serving.rows import Row, steer
from trimtab.serving.trace import Speller
from trimtab.serving.work import Job, Options, Prompt, Steered
from trimtab.steering.several import Several
from trimtab.store.files import package_versions, write_json
from trimtab.store.manifest import read_manifest

BARE = "host"
NEVER_SEC = 1e9


@dataclass(frozen=True)
class Way:
    """What says the distributions of a step's rows.

    Attributes:
        name: What the result calls it.
        rows: Its own, all with the same tokens as those of the other ways.
        steers: Whether an adapter does.
    """

    name: str
    rows: Sequence[Row]
    steers: bool

    def say(self, logits: Tensor, hidden: Tensor) -> Tensor:
        """The distributions, shape [rows, vocab]."""
        return steer(self.rows, logits, hidden) if self.steers else logits.log_softmax(-1)


def read_prompts(host: HFModel, batch: Batch, several: Several | None, count: int) -> list[Reading]:
    """Read the prompts as the server does; no row has joined the batch yet."""
    readings, speller = [], Speller(host)
    steered = None if several is None else Steered(several, (None,) * len(several.mixtures))
    for text in prompts(count):
        prompt, options = Prompt(tuple(prompt_ids(host, text))), Options(max_tokens=1)
        job = Job([prompt], options, steered=steered, tell=lambda _: None, time_limit_sec=NEVER_SEC)
        reading = Reading(host, batch, speller, job, 0)
        while not reading.go_on(None):
            pass
        readings.append(reading)
    return readings


def write_likeliest(host: HFModel, ways: Sequence[Way], logits: Tensor) -> None:
    """Give the rows of all ways the host's likeliest token that ends no answer."""
    ends = torch.tensor(list(host.end_ids), dtype=torch.long)
    likeliest = logits.index_fill(1, ends, -torch.inf).argmax(-1).tolist()
    for way in ways:
        for row, token_id in zip(way.rows, likeliest, strict=True):
            row.token_ids.append(token_id)
            row.pieces.append(host.vocabulary.token_bytes[token_id])


@torch.inference_mode()
def steps(host: HFModel, batch: Batch, ways: Sequence[Way], count: int) -> dict[str, list[float]]:
    """Seconds of each step's pass, by name "pass", and of what each way does after it.

    Args:
        host: The host.
        batch: With the rows' states.
        ways: The bare host first, whose likeliest tokens are written.
        count: How many steps.
    """
    took: dict[str, list[float]] = {"pass": [], **{way.name: [] for way in ways}}
    for number in range(count):
        began_sec = time.perf_counter()
        hidden = batch.step([row.token_ids[-1] for row in ways[0].rows])
        logits = host.unembedding.logits(hidden).float()
        took["pass"].append(time.perf_counter() - began_sec)
        for way in (ways[(number + place) % len(ways)] for place in range(len(ways))):
            began_sec = time.perf_counter()
            way.say(logits, hidden)
            took[way.name].append(time.perf_counter() - began_sec)
        write_likeliest(host, ways, logits)
    return took


def summary(took: dict[str, list[float]], name: str) -> dict[str, Any]:
    """Of a way: what it takes itself, and its step over the bare host's, step by step."""
    own = sorted(took[name])
    trio = zip(took["pass"], took[name], took[BARE], strict=True)
    ratios = sorted((whole + ours) / (whole + bare) for whole, ours, bare in trio)
    tenth = len(ratios) // 10
    return {
        "own_sec": statistics.median(own),
        "cost": {
            "median": statistics.median(ratios),
            "lowest_tenth": ratios[tenth],
            "highest_tenth": ratios[-1 - tenth],
        },
    }


def arguments() -> argparse.Namespace:
    """From the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--host", required=True)
    parser.add_argument("--adapter", type=Path, required=True)
    names = ["+".join(carriers) for carriers in CARRIERS]
    parser.add_argument("--carriers", nargs="*", choices=names, default=names)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--out", type=Path, required=True)
    return parser.parse_args()


@torch.inference_mode()
def ways_of(
    host: HFModel,
    batch: Batch,
    adapters: Adapters,
    carriers: Sequence[tuple[CarrierName, ...]],
    rows: int,
) -> list[Way]:
    """The bare host, whose states the batch holds, and the adapter by each set of carriers."""
    bare = read_prompts(host, batch, None, rows)
    for reading in bare:
        batch.join(reading.cache)
    ways = [Way(BARE, [reading.rows[0] for reading in bare], steers=False)]
    for some in carriers:
        several = adapters.mixture(adapters.chosen(f"{adapters.host_name}+{ADAPTER}", some, None))
        read = read_prompts(host, batch, several, rows)
        ways.append(Way("+".join(some), [reading.rows[0] for reading in read], steers=True))
    last_hidden = torch.cat([reading.last_hidden for reading in bare])
    write_likeliest(host, ways, host.unembedding.logits(last_hidden).float())
    return ways


def main() -> None:
    """Measure and write."""
    given = arguments()
    carried = set(read_manifest(given.adapter).carriers)
    carriers = [one for one in CARRIERS if "+".join(one) in given.carriers and {*one} <= carried]
    config = ServeConfig(
        host=given.host,
        name=BARE,
        carriers=tuple(dict.fromkeys(one for some in carriers for one in some)),
        dtype=given.dtype,
    )
    host = open_model(given.host, dtype=given.dtype)
    adapters, batch = Adapters(config, host), Batch(host)
    adapters.load(ADAPTER, given.adapter)
    ways = ways_of(host, batch, adapters, carriers, given.rows)
    steps(host, batch, ways, 3)
    took = steps(host, batch, ways, given.steps)
    found = {way.name: summary(took, way.name) for way in ways}
    for name, one in found.items():
        print(f"{name}: {1e3 * one['own_sec']:.2f} ms, a step costs {one['cost']['median']:.3f}")
    write_json(
        given.out,
        {
            "host": Path(given.host).parent.name if Path(given.host).exists() else given.host,
            "dtype": given.dtype,
            "rows": given.rows,
            "steps": given.steps,
            "pass_sec": statistics.median(took["pass"]),
            "ways": found,
            "threads": torch.get_num_threads(),
            "processor": processor(),
            "versions": package_versions(),
        },
    )


if __name__ == "__main__":
    main()
