"""Configurations of what measures, or estimates: evaluate, compare, cost."""

from pathlib import Path
from typing import Literal

from pydantic import Field, field_validator, model_validator

from trimtab.config.base import MIN_WINDOW_TOKENS, Config, Dtype, check_stride

MethodName = Literal[
    "zero-shot",
    "few-shot",
    "context",
    "expert",
    "trimtab",
    "live",
    "all",
    "label-head",
    "embeddings",
    "lora",
    "qlora",
    "full",
]
RowName = Literal[
    "host",
    "reference",
    "expert",
    "proxy",
    "proxy-0.5",
    "mixture",
    "temperature",
    "bias",
    "bytes",
    "state",
    "head",
    "memory",
    "head+memory",
    "head-shuffled",
    "memory-shuffled",
    "live",
    "live+head",
    "live+memory",
    "all",
]


class EvaluateConfig(Config):
    """Measure what an adapter changes on a host: domain text and general text."""

    adapter: Path
    """Adapter folder."""
    host: str
    """Host: hub name[@revision], folder, GGUF file, llamacpp:FILE.gguf, or tiny:NAME."""
    data: tuple[str, ...] = ()
    """Held-out domain text; it may be left out where there are tasks."""
    general: tuple[str, ...] = ()
    """General text, each file or glob one kind (KIND=GLOB)."""
    out: Path
    """Folder of report.json and report.html."""
    max_tokens: int | None = Field(default=None, ge=1)
    """Score at most this many host tokens of domain text (general text: a quarter, each kind)."""
    document_tokens: int = Field(default=1024, ge=64)
    """Score at most the first so many host tokens of each document."""
    window_tokens: int = Field(default=512, ge=16)
    """Window of the measurement."""
    stride_tokens: int = Field(default=256, ge=8)
    """New tokens in each window."""
    rows: tuple[RowName, ...] = ()
    """Rows to measure (default: those of the report that the adapter allows; of tasks the host,
    and head and memory together)."""
    tasks: tuple[Path, ...] = ()
    """Task files of lm-evaluation-harness: YAML files, with local data, that every row answers."""
    task_limit: int | None = Field(default=None, ge=1)
    """Ask at most this many questions of each task."""
    task_batch: int = Field(default=8, ge=1)
    """Questions that the host reads at once."""
    small: str | None = None
    """Where the small model lies, for what runs it; llamacpp:FILE.gguf runs it in llama.cpp
    (default: where the adapter says)."""
    host_keys: bool = False
    """Let the host read the memory's text once and key it by its own states: no training, but a
    pass over that text; better than keys that are read through the map."""
    domain: str | None = None
    """Name of the domain in the report (default: that of the first file or folder of --data)."""
    device_map: str | None = None
    """Where the host runs: cpu, cuda, cuda:1, or auto, which spreads it over all accelerators
    (default: auto where there are any). A small model runs on the first."""
    dtype: Dtype = "auto"
    """Arithmetic of the models."""
    processes: int | None = Field(default=None, ge=1)
    """Processes of one thread that share the documents (default: as many as pay, on a processor).
    """
    seed: int = 0
    """Seed of the bootstrap and of the shuffled controls."""

    _stride_fits = model_validator(mode="after")(check_stride)

    @model_validator(mode="after")
    def _something_is_measured(self) -> "EvaluateConfig":
        if not self.data and not self.tasks:
            raise ValueError("there is nothing to measure: give --data, or --tasks")
        return self


class CompareConfig(Config):
    """Compare ways to adapt a host on your own data: quality, cost, time, flexibility."""

    data: tuple[str, ...] = ()
    """Text or source files, folders, globs, .jsonl or .parquet files: your domain. It may be left
    out where there is a --task, whose questions are then the text."""
    small: str
    """Small model: hub name[@revision], folder, GGUF file, or tiny:NAME."""
    host: str
    """Host: hub name[@revision], folder, GGUF file, or tiny:NAME."""
    out: Path
    """Folder of the comparison; an interrupted one goes on there, method by method."""
    methods: tuple[MethodName, ...] = ()
    """Methods to compare (default, and for `all` alone: every one; beside others `all` is
    Trimtab's method of that name)."""
    budget: str = "20min"
    """Time for the whole comparison; what does not fit is estimated and marked so."""
    memory_gb: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    """Memory that the process, the open host included, may have (default: all that is free)."""
    task: Path | None = None
    """Your own questions, a JSONL file of `prompt`, `answer` and perhaps `choices`: one half is
    learnt from, of the other --task-questions are asked."""
    task_questions: int = Field(default=100, ge=2)
    """Questions that are asked at most."""
    general: tuple[str, ...] = ()
    """General text, each file or glob one kind (KIND=GLOB; default: the shipped probe text)."""
    test: tuple[str, ...] = ()
    """Test text (default: documents drawn from the data)."""
    test_share: float = Field(default=0.2, gt=0, lt=1)
    """Share of the documents that are drawn as test text."""
    test_tokens: int = Field(default=8192, ge=64)
    """Score at most this many host tokens of test text, and half as many of general text."""
    document_tokens: int | None = Field(default=None, ge=32)
    """Score at most the first so many host tokens of each document (default: --test-tokens shared
    out among 8 documents, or among all where there are fewer; general text likewise, each
    kind)."""
    window_tokens: int = Field(default=512, ge=16)
    """Window of the measurement."""
    examples: int = Field(default=4, ge=1)
    """Solved questions in a few-shot prompt."""
    few_shot_tokens: int = Field(default=256, ge=8)
    """Host tokens of training text in a few-shot prompt, where text is measured."""
    context_tokens: int = Field(default=1024, ge=16)
    """Host tokens of training text in the context, as far as the host's window has room."""
    epochs: int = Field(default=1, ge=1)
    """Passes over the training text, of every method that trains."""
    train_tokens: int | None = Field(default=None, ge=256)
    """Train on at most this many tokens an epoch (default: all)."""
    train_window_tokens: int = Field(default=256, ge=MIN_WINDOW_TOKENS)
    """Length of a training window."""
    rank: int = Field(default=16, ge=1, le=512)
    """LoRA rank, of the small model and of the host alike."""
    price: float | None = Field(default=None, gt=0, le=1e4, allow_inf_nan=False)
    """US dollars for an hour of this machine; costs are then shown in money too."""
    dtype: Dtype = "auto"
    """Arithmetic of the models."""
    seed: int = 0
    """Seed of the split, of all training and of the bootstrap."""

    @field_validator("methods")
    @classmethod
    def _all_is_every_one(cls, methods: tuple[MethodName, ...]) -> tuple[MethodName, ...]:
        return () if methods == ("all",) else methods

    @model_validator(mode="after")
    def _something_is_learnt(self) -> "CompareConfig":
        if not self.data and self.task is None:
            raise ValueError("there is nothing to learn from: give text, or --task")
        return self


class CostConfig(Config):
    """Estimate what each way to adapt a host costs: computation, memory, hours, money."""

    host_params: float = Field(ge=5e7, le=1e14, allow_inf_nan=False)
    """Parameters of the host, for example 70e9."""
    small_params: float = Field(ge=5e7, le=1e14, allow_inf_nan=False)
    """Parameters of the small model, for example 7e9."""
    tokens: float = Field(ge=1, le=1e15, allow_inf_nan=False)
    """Tokens of the training text, for example 50e6."""
    gpu: str = "h100"
    """Accelerator: a name of the sheet, such as h100, h200, b200, a100, l40s, rtx4090."""
    price: float | None = Field(default=None, gt=0, le=1e4, allow_inf_nan=False)
    """US dollars for one of them for one hour (default: the range that the sheet lists)."""
    hosts: int = Field(default=1, ge=1, le=1_000_000)
    """Hosts of this size that are to be adapted."""
    epochs: int = Field(default=1, ge=1, le=10_000)
    """Passes over the text in training, of the small model and of the host alike."""
    fit_tokens: float | None = Field(default=None, ge=256, allow_inf_nan=False)
    """Recorded tokens that fit uses, as its --max-tokens (default: all)."""
    lora_rank: int = Field(default=16, ge=1, le=65_536)
    """Rank of LoRA and QLoRA."""
    window_tokens: int = Field(default=2048, ge=MIN_WINDOW_TOKENS, le=10_000_000)
    """Length of a training window."""
    utilisation_low: float = Field(default=0.1, gt=0, le=1)
    """Least share of the peak operations that training reaches: an ordinary script."""
    utilisation_high: float = Field(default=0.45, gt=0, le=1)
    """Greatest share of the peak operations that training reaches: a tuned stack."""
    question_tokens: int = Field(default=500, ge=1, le=10_000_000)
    """Tokens of a request, without examples or context."""
    answer_tokens: int = Field(default=250, ge=1, le=10_000_000)
    """Tokens that are generated for a request."""
    few_shot_tokens: int = Field(default=2000, ge=1, le=10_000_000)
    """Tokens of examples that few-shot prompting adds to a request."""
    long_context_tokens: int = Field(default=32_000, ge=1, le=10_000_000)
    """Tokens of domain text that long-context prompting adds to a request."""
    requests_at_once: int = Field(default=32, ge=1, le=1_000_000)
    """Requests that a server answers together."""

    @model_validator(mode="after")
    def _bounds_are_ordered(self) -> "CostConfig":
        if self.utilisation_low > self.utilisation_high:
            raise ValueError("utilisation_low must be at most utilisation_high")
        return self
