"""Time per token of a host alone, steered plainly, and steered speculatively, side by side.

    python -m bench.speculative --expert FOLDER --host MODEL --text FILE ... --out RESULT.json

All ways run over the same prompts, the beginnings of the given files, one after another in each
repetition, so that what else the machine does meets them alike. Text is greedy. Figures are seconds
per new token: the median over repetitions, and the lowest and highest one.
"""

import argparse
import platform
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from trimtab.backends.hf import HFModel
from trimtab.backends.live import Live
from trimtab.backends.open import open_model
from trimtab.backends.pair import open_pair
from trimtab.steering import drafting
from trimtab.steering.evidence import Mixture
from trimtab.steering.predictors import Steering
from trimtab.steering.processor import steered_by
from trimtab.store.files import write_json


@dataclass(frozen=True)
class Way:
    """A way to decode: alone (draft_tokens None), plain (0), or speculative.

    Attributes:
        name: In the results.
        draft_tokens: As `Live` takes it.
        unlikely: Where the expert stops drafting.
        adapts: The draft grows by two where all stands and shrinks by one where it does not.
    """

    name: str
    draft_tokens: int | None
    unlikely: float = drafting.UNLIKELY
    adapts: bool = False


WAYS = (
    Way("host", None),
    Way("plain", 0),
    Way("speculative-2", 2),
    Way("speculative-4", 4),
    Way("speculative-8", 8),
    Way("speculative-4-fixed", 4, unlikely=0.0),
    Way("speculative-8-fixed", 8, unlikely=0.0),
    Way("speculative-8-adapts", 8, unlikely=0.0, adapts=True),
)


class Clock:
    """Hears when a prompt and each token come, as transformers' streamers do."""

    def __init__(self) -> None:
        self.heard_sec: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        """Note the time."""
        del value
        self.heard_sec.append(time.perf_counter())

    def end(self) -> None:
        """Nothing is held back."""


@dataclass
class Tally:
    """What the passes of one way have come to.

    Attributes:
        sec_per_token: One figure a repetition.
        block_tokens: Tokens that each pass of the host has read after the prompt.
        new_tokens: Tokens written, over all repetitions.
        text_ids: The text of the last repetition.
    """

    sec_per_token: list[float] = field(default_factory=list)
    block_tokens: list[int] = field(default_factory=list)
    new_tokens: int = 0
    text_ids: list[list[int]] = field(default_factory=list)


def main() -> None:
    options = _options()
    host = open_model(options.host, dtype=options.dtype)
    live = Live(open_pair(options.expert, dtype=options.dtype), host)
    prompts = [_prompt(host, path, options.prompt_tokens) for path in options.text]
    ways = [way for way in WAYS if not options.ways or way.name in options.ways]
    tallies = {way.name: Tally() for way in ways}
    for repetition in range(options.repetitions):
        # Another order each time, so that none always follows the same neighbour.
        for way in ways[repetition % len(ways) :] + ways[: repetition % len(ways)]:
            _run(way, host, live, prompts, options.new_tokens, tallies[way.name])
            print(repetition, way.name, f"{tallies[way.name].sec_per_token[-1]:.3f}", flush=True)
        write_json(options.out, _result(options, tallies))


def _options() -> Any:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--expert", type=Path, required=True, help="folder that tune wrote")
    parser.add_argument("--host", required=True)
    parser.add_argument("--text", nargs="+", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--ways", nargs="*", choices=[way.name for way in WAYS])
    parser.add_argument("--prompt-tokens", type=int, default=96)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--note", default="", help="what else the machine did")
    return parser.parse_args()


def _prompt(host: HFModel, path: Path, tokens: int) -> torch.Tensor:
    ids = host.encode(path.read_text(encoding="utf-8"))[:tokens]
    return torch.tensor([[*host.context_ids(), *ids]])


def _run(
    way: Way,
    host: HFModel,
    live: Live,
    prompts: Sequence[torch.Tensor],
    new_tokens: int,
    tally: Tally,
) -> None:
    live.draft_tokens = way.draft_tokens or 0
    mixture = Mixture(Steering(("live",), live=live))
    steers = nullcontext() if way.draft_tokens is None else steered_by(host, mixture)
    tally.text_ids, took_sec, written = [], 0.0, 0
    with steers, _as(way), _reading(host, tally):
        for prompt in prompts:
            clock = Clock()
            ids = host.model.generate(
                prompt, max_new_tokens=new_tokens, do_sample=False, streamer=clock
            )
            # The first token costs the reading of the prompt, which is not the question.
            took_sec += clock.heard_sec[-1] - clock.heard_sec[1]
            tally.text_ids.append(ids[0, prompt.shape[1] :].tolist())
            written += ids.shape[1] - prompt.shape[1] - 1
    tally.sec_per_token.append(took_sec / written)
    tally.new_tokens += written


@contextmanager
def _reading(host: HFModel, tally: Tally) -> Iterator[None]:
    def note(_module: Any, _args: Any, given: dict[str, Any]) -> None:
        tokens = given["input_ids"].shape[1]
        if given.get("past_key_values") is not None and given["past_key_values"].get_seq_length():
            tally.block_tokens.append(tokens)

    handle = host.model.register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _as(way: Way) -> Iterator[None]:
    unlikely, draft = drafting.UNLIKELY, drafting.Drafter.draft
    drafting.UNLIKELY = way.unlikely
    if way.adapts:
        drafting.Drafter.draft = _adapting(way.draft_tokens or 0, draft)
    try:
        yield
    finally:
        drafting.UNLIKELY, drafting.Drafter.draft = unlikely, draft


def _adapting(most: int, plain: Any) -> Any:
    """Drafts whose length follows from whether all of the last one stood."""
    state = {"length": most, "begun": 0, "drafted": 0}

    def draft(self: Any, written: Any, room: int, propose: Any) -> Any:
        if state["drafted"] and len(written.host_ids) > state["begun"]:
            stood = len(written.host_ids) - state["begun"] - 1 >= state["drafted"]
            change = 2 if stood else -1
            state["length"] = min(max(state["length"] + change, 1), most)
        found = plain(self, written, min(room, state["length"]), propose)
        state.update(begun=len(written.host_ids), drafted=len(found))
        return found

    return draft


def _result(options: Any, tallies: Mapping[str, Tally]) -> dict[str, Any]:
    plain = tallies.get("plain", Tally()).text_ids
    host = tallies["host"].sec_per_token if "host" in tallies else []
    rows = {}
    for name, tally in tallies.items():
        times = tally.sec_per_token
        ratios = [ours / alone for ours, alone in zip(times, host, strict=False)]
        rows[name] = {
            "sec_per_token": {
                "median": statistics.median(times),
                "low": min(times),
                "high": max(times),
            },
            "ratio_to_host": statistics.median(ratios) if ratios else None,
            "tokens_per_host_pass": tally.new_tokens / max(1, len(tally.block_tokens)),
            "tokens_read_per_host_pass": statistics.mean(tally.block_tokens or [0]),
            "same_text_as_plain": tally.text_ids == plain,
        }
    return {
        "schema": 1,
        "what": "seconds per new token, greedy, of a host alone, steered by the live carrier"
        " token by token (plain), and speculatively, by most drafted tokens; -fixed: the expert"
        " never stops early; -adapts: the draft grows by 2 where all stands and shrinks by 1",
        "machine": {"processor": platform.machine(), "threads": torch.get_num_threads()},
        "note": options.note,
        "host": Path(options.host).parent.name or options.host,
        "prompts": len(options.text),
        "prompt_tokens": options.prompt_tokens,
        "new_tokens": options.new_tokens,
        "repetitions": max((len(tally.sec_per_token) for tally in tallies.values()), default=0),
        "dtype": options.dtype,
        "rows": rows,
    }


if __name__ == "__main__":
    main()
