"""What steers a host that vLLM runs, and what a request may ask of it. Needs no vLLM."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from trimtab.config import CarrierName, PluginConfig
from trimtab.config.reading import read_values
from trimtab.errors import AdapterError, InputError
from trimtab.serving.adapters import strengths_of
from trimtab.steering.processor import DEFAULT_CARRIERS
from trimtab.store.manifest import read_manifest
from trimtab.vllm.hook import VARIABLE

ADAPTERS, CARRIERS = "trimtab", "trimtab_carriers"
"""A request's own arguments: `vllm_xargs` over HTTP, `SamplingParams.extra_args` offline."""

_NAMES = (ADAPTERS, CARRIERS)
_HINT = 'for example a file plugin.toml with the line adapter = ["zig=zig.adapter"]'


@dataclass(frozen=True)
class Asked:
    """What a request asks for.

    Attributes:
        adapters: Which adapters steer and how far, such as zig:0.7+legal:0.3; never empty.
        carriers: Which of their carriers steer; None for all that are served.
    """

    adapters: str
    carriers: tuple[CarrierName, ...] | None


@dataclass(frozen=True)
class Settings:
    """What steers a host.

    Attributes:
        config: The file's content.
        folders: Of the adapters, by name.
        carriers: That can steer, of each adapter, by name.
    """

    config: PluginConfig
    folders: Mapping[str, Path]
    carriers: Mapping[str, tuple[CarrierName, ...]]

    def asked(self, given: Mapping[str, Any] | None) -> Asked | None:
        """Read what a request asks for; None where nothing steers it.

        Args:
            given: The request's own arguments, of which those of other plugins are passed over.

        Raises:
            InputError: An adapter or a carrier is not there, or a strength is no number in [0, 2].
        """
        given = given or {}
        unknown = [name for name in given if name.startswith(ADAPTERS) and name not in _NAMES]
        if unknown:
            raise InputError(
                f"a request gives {', '.join(unknown)}", hint=f"use {' and '.join(_NAMES)}"
            )
        words = given.get(ADAPTERS, self.config.default or "")
        if not isinstance(words, str):
            raise InputError(
                f"a request gives {ADAPTERS}={words!r}",
                hint="name adapters, such as zig, zig:0.7 or zig:0.7+legal:0.3",
            )
        asked = Asked(words, _carriers(given.get(CARRIERS)))
        for name in strengths_of(words) if words else ():
            self._check(name, asked.carriers or ())
        return asked if words else None

    def _check(self, name: str, carriers: tuple[CarrierName, ...]) -> None:
        if name not in self.carriers:
            raise InputError(
                f"a request asks for {name!r}, which is no adapter here",
                hint=f"there are {', '.join(self.carriers)}",
            )
        missing = [carrier for carrier in carriers if carrier not in self.carriers[name]]
        if missing:
            raise InputError(
                f"a request asks for {', '.join(missing)} of {name}, which is not served",
                hint=f"ask for {', '.join(self.carriers[name])}",
            )


def read_settings() -> Settings:
    """Read the file that the environment names, and what its adapters carry.

    Raises:
        InputError: There is no file, or it holds something else.
        AdapterError: An adapter is broken, or carries nothing that can steer.
    """
    named = os.environ.get(VARIABLE)
    if not named:
        raise InputError(
            f"the environment variable {VARIABLE} names no file of settings", hint=_HINT
        )
    return settings_in(named)


def settings_in(named: str) -> Settings:
    """Read a file of settings, and what its adapters carry; errors are those of `read_settings`."""
    return settings_of(read_values(Path(named), VARIABLE), f"{VARIABLE} {named}", _HINT)


def settings_of(values: Mapping[str, Any], origin: str, hint: str) -> Settings:
    """Check settings, and read what their adapters carry.

    Args:
        values: By name.
        origin: Where they come from, for an error.
        hint: What to do where they are wrong.

    Raises:
        InputError: They are no settings.
        AdapterError: As `read_settings`.
    """
    try:
        config = PluginConfig.model_validate(values)
    except ValidationError as error:
        problems = [
            f"{'.'.join(map(str, problem['loc']))}: {problem['msg'].removeprefix('Value error, ')}"
            for problem in error.errors(include_url=False)
        ]
        raise InputError(f"{origin}: {'; '.join(problems)}", hint=hint) from error
    pairs = (given.partition("=") for given in config.adapter)
    folders = {name: Path(folder) for name, _, folder in pairs}
    carriers = {name: _steers(config, name, folder) for name, folder in folders.items()}
    settings = Settings(config, folders, carriers)
    settings.asked({})
    return settings


def _steers(config: PluginConfig, name: str, folder: Path) -> tuple[CarrierName, ...]:
    carried = tuple(read_manifest(folder).carriers)
    wanted = config.carriers or DEFAULT_CARRIERS
    found: tuple[CarrierName, ...] = tuple(one for one in DEFAULT_CARRIERS if one in carried)
    found = tuple(one for one in found if one in wanted)
    if not found:
        raise AdapterError(
            f"the adapter {name} carries {', '.join(carried)}, and of these nothing can steer a"
            f" host in vLLM ({', '.join(wanted)} can)",
            hint="fit a head or a memory; `trimtab serve` runs the expert beside the host",
        )
    return found


def _carriers(given: object) -> tuple[CarrierName, ...] | None:
    if given is None:
        return None
    names = given.split(",") if isinstance(given, str) else given
    asked = tuple(names) if isinstance(names, list | tuple) else (names,)
    found: tuple[CarrierName, ...] = tuple(one for one in DEFAULT_CARRIERS if one in asked)
    if not asked or len(found) < len(set(asked)):
        raise InputError(
            f"a request gives {CARRIERS}={given!r}; in vLLM head and memory can steer, and the"
            " expert, two small models beside the host, cannot",
            hint="ask for head, memory or head,memory; `trimtab serve` runs the expert too",
        )
    return found
