"""Pairs of a small model and a host that the transfer suite knows by name."""

import re
from dataclasses import dataclass

from examples.demo import models
from trimtab.errors import InputError


@dataclass(frozen=True)
class Pair:
    """A small model and the host that it steers; each a packaged model, hub name, folder or GGUF.

    Attributes:
        name: Its name in commands and results.
        small: The small model.
        host: The host.
    """

    name: str
    small: str
    host: str


_QWEN = "qwen2.5-coder"
PAIRS = {
    pair.name: pair
    for pair in (
        Pair("qwen-0.5b-1.5b", f"{_QWEN}-0.5b-instruct", f"{_QWEN}-1.5b-instruct"),
        Pair("smollm2-gemma3", "smollm2-135m-instruct", "gemma-3-270m"),
        Pair("smollm2-qwen-0.5b", "smollm2-135m-instruct", f"{_QWEN}-0.5b-instruct"),
        Pair("smollm2-qwen-1.5b", "smollm2-135m-instruct", f"{_QWEN}-1.5b-instruct"),
        Pair("gemma3-qwen-0.5b", "gemma-3-270m", f"{_QWEN}-0.5b-instruct"),
        Pair("gemma3-qwen-1.5b", "gemma-3-270m", f"{_QWEN}-1.5b-instruct"),
    )
}
"""The suite's own pairs: the first has one vocabulary, the others cross families."""


def pair_of(name: str, small: str | None, host: str | None) -> Pair:
    """A pair by name, or a new one of two models.

    Raises:
        InputError: The name is unknown and not both models are given.
    """
    if small and host:
        return Pair(name, small, host)
    if name not in PAIRS:
        raise InputError(
            f"there is no pair {name!r}",
            hint=f"choose one of {', '.join(PAIRS)}, or give --small and --host for a new one",
        )
    return PAIRS[name]


def folder_name(model: str) -> str:
    """A folder's name for a model: what is no letter, digit, dot or hyphen becomes a hyphen."""
    return re.sub(r"[^\w.-]+", "-", model).strip("-.")


def model_ref(name: str) -> str:
    """What `open_model` takes: a packaged model is fetched, anything else is left as it is."""
    return str(models.fetch_model(name)) if name in models.MODELS else name
