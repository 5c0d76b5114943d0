"""One frozen configuration per verb; the command line and its help are generated from these."""

from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from trimtab.config_base import Config
from trimtab.config_hosted import HostedOptions, is_hosted
from trimtab.config_hosted import ProbeConfig as ProbeConfig

MIN_WINDOW_TOKENS = 8
"""Of a training window."""

DRAFT_TOKENS = 0
"""Tokens that an expert drafts ahead at most, unless told otherwise: none, since no measurement
has yet shown on which machines and pairs a draft pays."""

Dtype = Literal["auto", "float32", "bfloat16"]
CarrierName = Literal["head", "memory", "expert"]
ExportKind = Literal["peft", "gguf", "merged", "onnx"]
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


class TuneConfig(Config):
    """Tune a small model on your text: the expert."""

    model: str
    """Small model: hub name[@revision], folder, GGUF file, or tiny:NAME."""
    data: tuple[str, ...] = Field(min_length=1)
    """Text or source files, folders, globs, .jsonl or .parquet files."""
    out: Path
    """Folder of the expert; an interrupted run continues there."""
    method: Literal["lora", "full"] = "lora"
    """LoRA leaves the base unchanged and its head untouched; full trains all weights."""
    rank: int = Field(default=16, ge=1, le=512)
    """LoRA rank."""
    loss: Literal["cross-entropy", "eaft"] = "cross-entropy"
    """eaft counts tokens less the surer the model is; validation is always cross-entropy."""
    eaft_alpha: float = Field(default=1.0, ge=0, allow_inf_nan=False)
    """How much less eaft counts them: power of the entropy's share; 0 is cross-entropy."""
    learning_rate: float | None = Field(default=None, gt=0, lt=1)
    """Peak of the one-cycle schedule (default: 0.001 with lora, 0.0003 with full)."""
    epochs: int = Field(default=1, ge=1)
    """Passes over the training text."""
    max_tokens: int | None = Field(default=None, ge=1)
    """Train on at most this many tokens an epoch (default: all)."""
    window_tokens: int = Field(default=256, ge=MIN_WINDOW_TOKENS)
    """Length of a packed training window."""
    batch_windows: int = Field(default=1, ge=1)
    """Windows in one optimiser step."""
    held_out: float = Field(default=0.1, ge=0, lt=1)
    """Share of documents kept for validation (early stopping, gates)."""
    patience: int = Field(default=2, ge=1)
    """Stop after this many validations without improvement."""
    validations: int = Field(default=4, ge=1)
    """Validations an epoch."""
    validation_tokens: int = Field(default=4096, ge=256)
    """Held-out tokens that a validation scores at most."""
    checkpoint_every_sec: float = Field(default=30.0, ge=0)
    """Write a checkpoint at least this often."""
    against: tuple[str, ...] = ()
    """Test files: near-duplicates of them are removed from training before anything else."""
    dtype: Dtype = "auto"
    """Arithmetic; auto takes bfloat16 where the processor has it in hardware."""
    seed: int = 0
    """Seed of everything random."""

    @model_validator(mode="after")
    def _alpha_is_used(self) -> "TuneConfig":
        if self.loss != "eaft" and self.eaft_alpha != TuneConfig.model_fields["eaft_alpha"].default:
            raise ValueError("eaft_alpha has an effect with loss eaft only")
        return self

    @property
    def peak_learning_rate(self) -> float:
        """The learning rate, or what suits the method where none is given."""
        if self.learning_rate is not None:
            return self.learning_rate
        return 1e-3 if self.method == "lora" else 3e-4


class RecordConfig(Config):
    """Record the soft targets of an expert and its reference over a text."""

    expert: Path
    """Folder that `tune` wrote."""
    out: Path
    """Folder of the recording; an interrupted run continues there."""
    data: tuple[str, ...] = ()
    """Text to record (default: the text that the expert was tuned on)."""
    general: tuple[str, ...] = ()
    """General text that the adapter must leave alone (default: the shipped probe text)."""
    max_tokens: int | None = Field(default=None, ge=1)
    """Record at most this many tokens of domain text (default: all)."""
    general_tokens: int | None = Field(default=None, ge=1)
    """Record at most this many tokens of general text, of which a mount reads as many (default:
    all)."""
    encoding: Literal["exact", "sparse", "sampled"] = "exact"
    """exact: both final hidden states; sparse: top-k; sampled: unbiased draws (RS-KD)."""
    top_k: int = Field(default=64, ge=1, le=4096)
    """Tokens kept per position in the sparse encoding, draws in the sampled one."""
    window_tokens: int = Field(default=512, ge=16)
    """Length of the windows that are run."""
    stride_tokens: int = Field(default=448, ge=8)
    """New tokens in each window; the rest of the window is context."""
    shard_tokens: int = Field(default=8192, ge=256)
    """Tokens in one shard, the unit of resuming."""
    dtype: Dtype = "auto"
    """Arithmetic of the forward passes."""
    seed: int = 0
    """Seed of the sampled encoding."""

    @model_validator(mode="after")
    def _stride_fits(self) -> "RecordConfig":
        if self.stride_tokens > self.window_tokens:
            raise ValueError("stride_tokens must be at most window_tokens")
        return self


class FitConfig(Config):
    """Fit an adapter's carriers to a recording."""

    recording: Path
    """Folder that `record` wrote."""
    out: Path
    """Folder of the adapter."""
    name: str | None = None
    """Name that the adapter's card carries (default: that of the folder)."""
    licence: str = "not stated"
    """Terms of the adapter itself, in words or as an SPDX name."""
    data_licence: str = "not stated"
    """Terms of the training text."""
    model_licence: str = "not stated"
    """Terms of the small model."""
    carriers: tuple[CarrierName, ...] = ("head", "memory", "expert")
    """Which carriers to make."""
    max_tokens: int | None = Field(default=None, ge=256)
    """Use at most this many recorded tokens of domain text (default: all)."""
    rank: int = Field(default=64, ge=1, le=512)
    """Rank of the head."""
    epochs: int = Field(default=6, ge=1)
    """Passes of the head over the recording."""
    learning_rate: float = Field(default=1.5e-3, gt=0, lt=1)
    """Step size of the head's AdamW."""
    active_tokens: int = Field(default=8192, ge=64)
    """Tokens that the head's loss tells apart; the rest is one tail."""
    general_weight: float = Field(default=1.0, ge=0)
    """Weight of leaving general text alone, against following the soft targets."""
    key_size: int = Field(default=192, ge=8)
    """Dimensions of a memory key after whitening."""
    values: Literal["hard", "soft"] = "hard"
    """What a memory entry says: the bytes that followed, or the expert's distribution."""
    anchors: int = Field(default=16384, ge=64)
    """Token strings whose unembedding the adapter carries for mounting."""
    host: str | None = None
    """Fit the head on this host's own hidden states instead (host-fit)."""
    targets: Literal["expert", "blend", "labels"] = "expert"
    """What a host-fit head follows; blend: host, expert and reference; labels: the text itself."""
    checkpoint_every_sec: float = Field(default=30.0, ge=0)
    """Save the head at least this often, so that an interrupted fit continues there."""
    dtype: Dtype = "auto"
    """Arithmetic of a host's forward passes (host-fit only)."""
    seed: int = 0
    """Seed of everything random."""

    @model_validator(mode="after")
    def _targets_need_a_host(self) -> "FitConfig":
        if self.targets != "expert" and self.host is None:
            raise ValueError(
                f"targets {self.targets} are for a head that is fitted on a host (--host);"
                " a head on the small model follows the expert"
            )
        return self


class MountConfig(Config):
    """Seat an adapter on a host: closed form, no training."""

    adapter: Path
    """Adapter folder."""
    host: str
    """Host: hub name[@revision], folder, GGUF file, or tiny:NAME."""
    carriers: tuple[CarrierName, ...] | None = None
    """Carriers to seat (default: all that the adapter has)."""
    ridge: float = Field(default=1e-3, gt=0)
    """Ridge of the map, as a share of the mean diagonal."""
    moments: bool = True
    """Match means and standard deviations on the probe text (one short forward pass)."""
    host_keys: bool = False
    """Let the host read the memory's text once and key it by its own states: no training, but a
    pass over that text; better than keys that are read through the map."""
    shuffle: bool = False
    """Control: pair the anchors at random, which must not help."""
    cache: bool = True
    """Keep what is computed: for this adapter and host, and the host's pass over the probe text."""
    dtype: Dtype = "auto"
    """Arithmetic of the host."""
    seed: int = 0
    """Seed of the shuffle."""


class ExportConfig(Config):
    """Export an adapter's mounted head for engines that run without Trimtab."""

    adapter: Path
    """Adapter folder."""
    host: str
    """Host: hub name[@revision], folder, GGUF file, or tiny:NAME."""
    to: ExportKind
    """peft: LoRA on lm_head; gguf: LoRA for llama.cpp; merged: whole checkpoint; onnx: graph."""
    out: Path
    """Folder of the export; it must be new or empty."""
    strength: float = Field(default=1.0, gt=0, le=2)
    """How far to follow the head; it is in the weights, except in onnx."""
    lora_bias: bool = False
    """With peft: keep the head's constant part as PEFT's lora_bias, exact; other engines refuse."""
    dtype: Dtype = "auto"
    """Arithmetic of the host, and of the weights of a merged checkpoint."""

    @model_validator(mode="after")
    def _bias_is_for_peft(self) -> "ExportConfig":
        if self.lora_bias and self.to != "peft":
            raise ValueError("lora_bias is a setting of PEFT's own form: it needs to peft")
        return self


class _Generation(Config):
    """What is generated, and how."""

    host: str
    """Host: hub name[@revision], folder, GGUF file, tiny:NAME, or openai:MODEL and anthropic:MODEL
    behind an API."""
    prompt: tuple[str, ...] = Field(min_length=1)
    """Prompts; several are run as one batch."""
    adapter: Path | None = None
    """Adapter folder (default: the host alone)."""
    carriers: tuple[CarrierName, ...] | None = None
    """Carriers to use (default: head and memory; with a host behind an API the expert)."""
    strength: float = Field(default=1.0, ge=0, le=2)
    """How far to follow the adapter; 0 is the host itself, bit for bit."""
    small: str | None = None
    """Where the small model lies, for what runs it (default: where the adapter says)."""
    host_keys: bool = False
    """Let the host read the memory's text once and key it by its own states: no training, but a
    pass over that text; better than keys that are read through the map."""
    draft_tokens: int = Field(default=DRAFT_TOKENS, ge=0, le=64)
    """With the expert and one prompt: tokens that it drafts ahead at most, for the host to verify
    in one pass; with a host behind an API: tokens that a request asks for ahead. The text is
    chosen as without (0: none)."""
    max_new_tokens: int = Field(default=128, ge=1)
    """Longest continuation."""
    temperature: float = Field(default=0.0, ge=0)
    """0 takes the most likely token."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Sample from the smallest set of tokens with this much probability."""
    top_k: int = Field(default=0, ge=0)
    """Sample from this many tokens (0: all)."""
    stop: tuple[str, ...] = ()
    """Strings that end a continuation."""
    chat: bool = False
    """Read each prompt as a user's message and apply the models' chat templates."""
    device_map: str | None = None
    """How accelerate spreads the host over devices, for example auto."""
    dtype: Dtype = "auto"
    """Arithmetic of the models."""
    seed: int = 0
    """Seed of sampling."""


class GenerateConfig(HostedOptions, _Generation):
    """Continue a prompt with a steered host."""

    @model_validator(mode="after")
    def _api_is_used(self) -> "GenerateConfig":
        if self.api_url is not None and not is_hosted(self.host):
            raise ValueError("api_url is for a host openai:MODEL or anthropic:MODEL")
        return self


class EvaluateConfig(Config):
    """Measure what an adapter changes on a host: domain text and general text."""

    adapter: Path
    """Adapter folder."""
    host: str
    """Host: hub name[@revision], folder, GGUF file, or tiny:NAME."""
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
    """Where the small model lies, for what runs it (default: where the adapter says)."""
    host_keys: bool = False
    """Let the host read the memory's text once and key it by its own states: no training, but a
    pass over that text; better than keys that are read through the map."""
    domain: str | None = None
    """Name of the domain in the report (default: that of the first file or folder of --data)."""
    dtype: Dtype = "auto"
    """Arithmetic of the models."""
    seed: int = 0
    """Seed of the bootstrap and of the shuffled controls."""

    @model_validator(mode="after")
    def _stride_fits(self) -> "EvaluateConfig":
        if self.stride_tokens > self.window_tokens:
            raise ValueError("stride_tokens must be at most window_tokens")
        return self

    @model_validator(mode="after")
    def _something_is_measured(self) -> "EvaluateConfig":
        if not self.data and not self.tasks:
            raise ValueError("there is nothing to measure: give --data, or --tasks")
        return self


class ServeConfig(Config):
    """Serve a host and adapters to OpenAI's clients, over HTTP."""

    host: str
    """Host: hub name[@revision], folder, GGUF file, or tiny:NAME."""
    adapter: tuple[str, ...] = ()
    """Adapter that requests may choose, as NAME=FOLDER."""
    name: str | None = None
    """What requests call the host (default: as it is given here)."""
    carriers: tuple[CarrierName, ...] | None = None
    """Carriers that steer (default: head and memory, as far as an adapter has them)."""
    small: str | None = None
    """Where the small model lies, for what runs it (default: where the adapter says)."""
    host_keys: bool = False
    """Let the host read the memory's text once and key it by its own states: no training, but a
    pass over that text; better than keys that are read through the map."""
    address: str = "127.0.0.1"
    """Where to listen; any but a loopback address needs --keys."""
    port: int = Field(default=8000, ge=0, le=65535)
    """Where to listen; 0 takes a free one."""
    keys: Path | None = None
    """File of API keys, which `trimtab key` writes (default: whoever reaches the port may ask)."""
    requests_per_minute: int | None = Field(default=None, ge=1)
    """Requests of a key in a minute, unless the key has a limit of its own (default: any)."""
    slots: int = Field(default=16, ge=1, le=1024)
    """Answers in the making at once."""
    queue: int = Field(default=64, ge=1, le=100_000)
    """Requests that may wait for a slot; the next is told when to come back."""
    context_tokens: int = Field(default=4096, ge=16)
    """Longest prompt and answer together, and no longer than the host's positions."""
    body_bytes: int = Field(default=1_000_000, ge=1024, le=100_000_000)
    """Largest request."""
    time_limit_sec: float = Field(default=300.0, gt=0, le=86_400)
    """Longest time for a request, in the queue included."""
    shutdown_sec: float = Field(default=30.0, ge=0, le=3600)
    """Time for requests in flight to end after Ctrl-C or SIGTERM."""
    trace_text: bool | None = None
    """Tell requests with a trace what a memory found and where, which is training text (default:
    only without --keys)."""
    log_prompts: bool = False
    """Write prompts and answers into the log too."""
    device_map: str | None = None
    """How accelerate spreads the host over devices, for example auto."""
    dtype: Dtype = "auto"
    """Arithmetic of the models."""

    @model_validator(mode="after")
    def _adapters_have_names(self) -> "ServeConfig":
        for given in self.adapter:
            name, separator, folder = given.partition("=")
            if not (name and separator and folder):
                raise ValueError(f"an adapter is given as NAME=FOLDER, and {given!r} is not")
        names = [given.partition("=")[0] for given in self.adapter]
        if len(set(names)) < len(names):
            raise ValueError("each adapter needs a name of its own")
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


class CompareConfig(Config):
    """Compare ways to adapt a host on your own data: quality, cost, time, flexibility."""

    data: tuple[str, ...] = Field(min_length=1)
    """Text or source files, folders, globs, .jsonl or .parquet files: your domain."""
    small: str
    """Small model: hub name[@revision], folder, GGUF file, or tiny:NAME."""
    host: str
    """Host: hub name[@revision], folder, GGUF file, or tiny:NAME."""
    out: Path
    """Folder of the comparison; an interrupted one goes on there, method by method."""
    methods: tuple[MethodName, ...] = ()
    """Methods to compare (default: all)."""
    budget: str = "20min"
    """Time for the whole comparison; what does not fit is estimated and marked so."""
    memory_gb: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    """Memory that a method may take (default: what is free)."""
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
    document_tokens: int = Field(default=1024, ge=32)
    """Score at most the first so many host tokens of each document."""
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
