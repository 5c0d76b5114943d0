"""Configurations of the steps that make an adapter, or let it grow."""

from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from trimtab.config.base import (
    MIN_WINDOW_TOKENS,
    CarrierName,
    Config,
    Dtype,
    TuneMethod,
    check_stride,
)


class TuneConfig(Config):
    """Tune a small model on your text: the expert."""

    model: str
    """Small model: hub name[@revision], folder, GGUF file, or tiny:NAME."""
    data: tuple[str, ...] = Field(min_length=1)
    """Text or source files, folders, globs, .jsonl or .parquet files."""
    out: Path
    """Folder of the expert; an interrupted run continues there."""
    method: TuneMethod = "lora"
    """LoRA leaves the base unchanged and its head untouched; qlora is a LoRA trained over a base in
    four bits; full trains all weights."""
    rank: int = Field(default=16, ge=1, le=512)
    """LoRA rank."""
    loss: Literal["cross-entropy", "eaft"] = "cross-entropy"
    """eaft counts tokens less the surer the model is; validation is always cross-entropy."""
    eaft_alpha: float = Field(default=1.0, ge=0, allow_inf_nan=False)
    """How much less eaft counts them: power of the entropy's share; 0 is cross-entropy."""
    learning_rate: float | None = Field(default=None, gt=0, lt=1)
    """Peak of the one-cycle schedule (default: tried out on held-out text; with full 0.00003)."""
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
    def usual_learning_rate(self) -> float:
        """The learning rate, or what is usual for the method where none is given or tried."""
        if self.learning_rate is not None:
            return self.learning_rate
        return 3e-5 if self.method == "full" else 1e-3


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
    encoding: Literal["exact", "compact", "sparse", "sampled"] = "exact"
    """What is kept of the training text. exact: both final hidden states; compact: the
    reference's, and a hundred bytes of the expert's; sparse: top-k; sampled: unbiased draws
    (RS-KD)."""
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
    processes: int | None = Field(default=None, ge=1)
    """Processes of one thread that share the work (default: as many as pay, on a processor)."""
    seed: int = 0
    """Seed of the sampled encoding."""

    _stride_fits = model_validator(mode="after")(check_stride)


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
    """Most frequent tokens that the head's loss tells apart; without --host a step compares
    2,048 of them."""
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


class AppendConfig(Config):
    """Append text to an adapter's memory: one pass of the small model, nothing is fitted."""

    adapter: Path
    """Folder of the adapter."""
    data: tuple[str, ...] = Field(min_length=1)
    """Text or source files, folders, globs, .jsonl or .parquet files."""
    out: Path | None = None
    """Folder of the grown adapter (default: the adapter's own, replaced when all is done)."""
    against: tuple[str, ...] = ()
    """Test files: near-duplicates of them are left out."""
    small: str | None = None
    """Where the small model lies (default: where the adapter says)."""
    data_licence: str | None = None
    """Terms of all the text that the memory then holds (default: as they were)."""
    dtype: Dtype = "auto"
    """Arithmetic of the forward passes."""
