"""Base of all configurations, and what several of them name."""

from collections.abc import Sequence
from typing import Literal, Protocol, TypeVar

from pydantic import BaseModel, ConfigDict

Dtype = Literal["auto", "float32", "bfloat16"]
CarrierName = Literal["head", "memory", "expert"]
TuneMethod = Literal["lora", "qlora", "full"]

MIN_WINDOW_TOKENS = 8
"""Of a training window."""


class Config(BaseModel):
    """Base of all verbs' configurations: frozen, no unknown keys, documented fields."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", validate_default=True, use_attribute_docstrings=True
    )


class Strided(Protocol):
    """What reads text in windows that overlap."""

    @property
    def window_tokens(self) -> int:
        """Length of a window."""
        ...

    @property
    def stride_tokens(self) -> int:
        """New tokens in each."""
        ...


Windows = TypeVar("Windows", bound=Strided)


def check_stride(config: Windows) -> Windows:
    """Make sure that no token lies between two windows.

    Raises:
        ValueError: One would.
    """
    if config.stride_tokens > config.window_tokens:
        raise ValueError("stride_tokens must be at most window_tokens")
    return config


def check_named(adapters: Sequence[str]) -> None:
    """Make sure that adapters are given as NAME=FOLDER, each under a name of its own.

    Raises:
        ValueError: One is not, or two share a name.
    """
    for given in adapters:
        name, separator, folder = given.partition("=")
        if not (name and separator and folder):
            raise ValueError(f"an adapter is given as NAME=FOLDER, and {given!r} is not")
    names = [given.partition("=")[0] for given in adapters]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"each adapter needs a name of its own, and two are called {name}")
