"""Configuration of the plugin by which another engine, vLLM, runs the host. No torch."""

from typing import Literal

from pydantic import Field, model_validator

from trimtab.config.base import Config, Dtype, check_named

LightCarrier = Literal["head", "memory"]


class PluginConfig(Config):
    """What steers a host that vLLM runs."""

    adapter: tuple[str, ...] = Field(min_length=1)
    """Adapters that requests may choose, each as NAME=FOLDER."""
    default: str | None = None
    """Steers requests that choose nothing, in their words, such as zig:0.7 (default: nothing)."""
    carriers: tuple[LightCarrier, ...] | None = Field(default=None, min_length=1)
    """Carriers that steer (default: head and memory, as far as an adapter has them)."""
    host: str | None = None
    """Host's checkpoint in safetensors: hub name[@revision] or folder (default: as vLLM has it)."""
    host_keys: bool = False
    """Key the memory's text by the host's own states, as in `trimtab mount --host-keys`."""
    dtype: Dtype = "auto"
    """Arithmetic of the host where adapters are mounted on it, as in `trimtab mount --dtype`."""

    @model_validator(mode="after")
    def _adapters_have_names(self) -> "PluginConfig":
        check_named(self.adapter)
        return self
