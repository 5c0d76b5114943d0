"""Configurations of what an adapter does on a host: mount, export, generate, serve."""

from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from trimtab.config.base import CarrierName, Config, Dtype, check_named
from trimtab.config.hosted import HostedOptions, check_api_url

DRAFT_TOKENS = 8
"""Tokens that an expert drafts ahead at most, unless told otherwise; it stops earlier where it is
unsure. With drafts a token takes half of the plain way's time (docs/speed.md)."""

ExportKind = Literal["peft", "gguf", "merged", "onnx"]


class MountConfig(Config):
    """Seat an adapter on a host: closed form, no training."""

    adapter: Path
    """Adapter folder."""
    host: str
    """Host: hub name[@revision], folder, GGUF file, llamacpp:FILE.gguf, or tiny:NAME."""
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
    device_map: str | None = None
    """Where the host runs: cpu, cuda, cuda:1, or auto, which spreads it over all accelerators
    (default: auto where there are any)."""
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
    """Host: hub name[@revision], folder, GGUF file, llamacpp:FILE.gguf (quantised, in llama.cpp),
    tiny:NAME, or openai:MODEL and anthropic:MODEL behind an API."""
    prompt: tuple[str, ...] = Field(min_length=1)
    """Prompts; several are run as one batch."""
    adapter: Path | None = None
    """Adapter folder (default: the host alone)."""
    carriers: tuple[CarrierName, ...] | None = None
    """Carriers to use (default: head and memory; with a host behind an API the expert)."""
    strength: float = Field(default=1.0, ge=0, le=2)
    """How far to follow the adapter; 0 is the host itself, bit for bit."""
    small: str | None = None
    """Where the small model lies, for what runs it; llamacpp:FILE.gguf runs it in llama.cpp
    (default: where the adapter says)."""
    host_keys: bool = False
    """Let the host read the memory's text once and key it by its own states: no training, but a
    pass over that text; better than keys that are read through the map."""
    draft_tokens: int | None = Field(default=None, ge=0, le=64)
    """With the expert and one prompt: tokens that it drafts ahead at most, for the host to verify
    in one pass (default: 8); with a host behind an API: tokens that a request asks for ahead, and
    pays for (default: 0). The text is chosen as without (0: none)."""
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
    """Where the host runs: cpu, cuda, cuda:1, or auto, which spreads it over all accelerators
    (default: auto where there are any). A small model runs on the first."""
    dtype: Dtype = "auto"
    """Arithmetic of the models."""
    seed: int = 0
    """Seed of sampling."""


class GenerateConfig(HostedOptions, _Generation):
    """Continue a prompt with a steered host."""

    @model_validator(mode="after")
    def _api_is_used(self) -> "GenerateConfig":
        check_api_url(self.host, self.api_url)
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
    """Where the small model lies, for what runs it; llamacpp:FILE.gguf runs it in llama.cpp
    (default: where the adapter says)."""
    host_keys: bool = False
    """Let the host read the memory's text once and key it by its own states: no training, but a
    pass over that text; better than keys that are read through the map."""
    engine: Literal["transformers", "vllm"] = "transformers"
    """What runs the host: this process, or vLLM's own server with the plugin in it, for very large
    deployments (see docs/vllm.md)."""
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
    """Requests that may wait for a slot, of one key three quarters of them; the next is told when
    to come back."""
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
    """Where the host runs: cpu, cuda, cuda:1, or auto, which spreads it over all accelerators
    (default: auto where there are any). A small model runs on the first."""
    dtype: Dtype = "auto"
    """Arithmetic of the models."""

    @model_validator(mode="after")
    def _adapters_have_names(self) -> "ServeConfig":
        check_named(self.adapter)
        return self

    def adapters(self) -> tuple[tuple[str, Path], ...]:
        """Names and folders of the adapters."""
        pairs = (given.partition("=") for given in self.adapter)
        return tuple((name, Path(folder)) for name, _, folder in pairs)
