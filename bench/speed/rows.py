"""The rows of the speed bench: what each is, its unit, its goal, and the pairs of models."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from bench.speed.shapes import SCHEME

Unit = Literal["time ratio", "throughput ratio", "sec"]


@dataclass(frozen=True)
class Row:
    """A figure of the speed bench.

    Attributes:
        name: Its name in the results.
        unit: Of its value; a time ratio is of the bare host's time per generated token, unless
            `what` says otherwise.
        what: What is measured, for the table.
        goal: Bound that the project has set itself, in words; empty for rows to compare with.
        low: The value should be at least this.
        high: The value should be at most this.
    """

    name: str
    unit: Unit
    what: str
    goal: str = ""
    low: float | None = None
    high: float | None = None

    @property
    def has_bound(self) -> bool:
        """A value can meet the goal or miss it."""
        return self.low is not None or self.high is not None

    def is_met(self, value: float) -> bool:
        """Whether a value is within the bounds."""
        over = self.low is None or value >= self.low
        return over and (self.high is None or value <= self.high)


_RATIO: Unit = "time ratio"
_ALL = (
    Row("head", _RATIO, "mounted head", "at most 1.02", high=1.02),
    Row("memory-1m", _RATIO, "memory of a million keys"),
    Row("head+memory-1m", _RATIO, "both", "at most 1.10", high=1.10),
    Row("live-plain", _RATIO, "expert and reference beside the host", "see below the table"),
    Row("live-speculative", _RATIO, "the same, the expert drafting", "at most 1.0", high=1.0),
    Row("live-speculative-demo", _RATIO, "the same, the demo's pair", "at most 1.1", high=1.1),
    Row("lockstep-proxy", _RATIO, "proxy tuning as published, three models in lock-step"),
    Row("assisted", _RATIO, "transformers' assisted generation, unsteered"),
    Row("peft-lora", _RATIO, "LoRA on the host, beside its weights, unsteered"),
    Row(
        "record",
        "throughput ratio",
        "recording, against the two forward passes",
        "at least 0.95",
        low=0.95,
    ),
    Row("mount", "sec", "seat of head and memory on the host", "below 10 s", high=10.0),
    Row("fit", "sec", "head and memory from 100,000 tokens", "below 300 s", high=300.0),
    Row("fit-over-lora", _RATIO, "fit over a pass of LoRA on the host", "below 0.05", high=0.05),
    Row("pipeline-over-lora", _RATIO, "tune, record and fit over the same"),
    Row("cli-help", _RATIO, "`trimtab --help` over importing typer", "at most 2.5", high=2.5),
)
ROWS = {row.name: row for row in _ALL}
"""All rows by name, in the order of the table."""

DECODING = (
    *("head", "memory-1m", "head+memory-1m", "live-plain", "live-speculative"),
    *("lockstep-proxy", "assisted", "peft-lora"),
)
"""Rows that are timed side by side with the bare host, token by token."""

DEMO_ROW = "live-speculative-demo"
"""The one row of the demo's pair, whatever pair the others are of."""

Text = Literal["zig", "python"]


@dataclass(frozen=True)
class Pair:
    """A small model and the host that it steers; packaged models, or names that `open_model` takes.

    Attributes:
        name: Its name in commands and results.
        small: The small model.
        host: The host.
        is_one_vocabulary: Both have the same tokens, which lock-step proxy tuning needs.
        text: What the expert learns and the host continues.
        tokenizer: Folder of the tokenizer that models with random weights get.
    """

    name: str
    small: str
    host: str
    is_one_vocabulary: bool
    text: Text = "zig"
    tokenizer: Path | None = None

    @property
    def is_random(self) -> bool:
        """The models have published sizes and random weights."""
        return self.host.startswith(SCHEME)


_QWEN, _TINY = "qwen2.5-coder", "tiny:llama?vocab=bpe"
PAIRS = {
    pair.name: pair
    for pair in (
        Pair("qwen", f"{_QWEN}-0.5b-instruct", f"{_QWEN}-1.5b-instruct", True),
        Pair("demo", "smollm2-135m-instruct", "gemma-3-270m", False),
        *(
            Pair(name, f"{SCHEME}qwen2.5-0.5b", f"{SCHEME}qwen2.5-{name}", True, "python")
            for name in ("7b", "32b")
        ),
        Pair("tiny", _TINY, f"{_TINY}&hidden=96&layers=3&seed=5", True, "python"),
    )
}
"""The pairs by name; `7b` and `32b` are sizes alone, and `tiny` says nothing but that the bench
runs."""

DRAFTING = ("live-speculative", DEMO_ROW, "assisted")
"""Rows whose speed depends on how well one model foretells another."""


@dataclass(frozen=True)
class Settings:
    """How much is measured.

    Attributes:
        repetitions: Of everything that is interleaved.
        prompts: Of each repetition, each of another file.
        prompt_tokens: Of a prompt, of the host.
        new_tokens: Written after a prompt.
        draft_tokens: What the expert drafts at most.
        tune_tokens: What the expert is tuned on.
        record_tokens: Domain text that the adapter is made of.
        general_tokens: General text likewise; None for all that ships.
        row_tokens: What the row `record` records in each repetition.
        anchors: Token strings that the adapter carries for mounting.
        memory_entries: Keys of the large memory.
        fit_tokens: Recorded tokens of the rows of fit.
        lora_steps: Steps of training that are timed in each repetition.
    """

    repetitions: int = 3
    prompts: int = 2
    prompt_tokens: int = 96
    new_tokens: int = 32
    draft_tokens: int = 8
    tune_tokens: int = 6_144
    record_tokens: int = 6_144
    general_tokens: int | None = None
    row_tokens: int = 3_072
    anchors: int = 32_768
    memory_entries: int = 1_000_000
    fit_tokens: int = 100_000
    lora_steps: int = 1


QUICK = Settings(
    repetitions=2,
    prompts=1,
    prompt_tokens=32,
    new_tokens=12,
    tune_tokens=512,
    record_tokens=1_024,
    general_tokens=1_024,
    row_tokens=512,
    anchors=8_192,
    memory_entries=20_000,
    fit_tokens=2_048,
    lora_steps=1,
)
"""Enough to see that every row runs; its figures say little."""
