"""Where a model behind an API is served, its key, and what to do when it does not answer."""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import final

from trimtab.errors import InputError

KEY_VARIABLE = "TRIMTAB_API_KEY"
SERVICES: Mapping[str, tuple[str, str]] = {
    "openai": ("https://api.openai.com/v1", "OPENAI_API_KEY"),
    "anthropic": ("https://api.anthropic.com/v1", "ANTHROPIC_API_KEY"),
}
"""By dialect: the service's own address, and the variable with its key, sent nowhere else."""

ANY_MODEL = "?"
"""Stands for a model whose name is asked for."""

_QUESTIONS = re.compile(r"(/chat)?/completions$|/messages$|/models$")
_VERSION = re.compile(r"/v\d\w*(/|$)")

CHANGED = (
    "what this API shows has changed since it was looked at: look again with `trimtab hosts probe`"
)
"""What to do where it answers without what it has shown before."""


@final
@dataclass(frozen=True)
class Address:
    """Where a model is served.

    Attributes:
        dialect: openai or anthropic.
        url: Up to the version.
        model: As the service calls it.
    """

    dialect: str
    url: str
    model: str

    @staticmethod
    def of(host: str, url: str | None) -> "Address":
        """Read openai:MODEL or anthropic:MODEL, at an address or at the service's own.

        Raises:
            InputError: There is no name of a model.
        """
        dialect, _, model = host.partition(":")
        if not model:
            raise InputError(
                f"{host} names no model", hint=f"write it after the colon: {dialect}:MODEL"
            )
        return Address(dialect, url or SERVICES[dialect][0], model)


def key_of(address: Address) -> str:
    """The key that the environment holds for an address; empty where there is none.

    Raises:
        InputError: It holds characters that no key has.
    """
    own_url, variable = SERVICES[address.dialect]
    # A service's own key goes to that service alone.
    names = [KEY_VARIABLE, variable] if address.url == own_url else [KEY_VARIABLE]
    key = next((os.environ[name] for name in names if os.environ.get(name)), "").strip()
    if not key.isascii() or not key.isprintable() or " " in key:
        raise InputError(
            f"the key in {' or '.join(names)} holds characters that no key has",
            hint="set it again, without line breaks and quotation marks",
        )
    return key


def missing_key(address: Address) -> str:
    """What to say where a service's own address is asked without a key; empty elsewhere."""
    own_url, variable = SERVICES[address.dialect]
    if address.url != own_url or key_of(address):
        return ""
    return (
        f"{own_url} is asked without a key, which it is likely to refuse: put one into the variable"
        f" {variable} or {KEY_VARIABLE}"
    )


def of_the_address(address: Address) -> str:
    """What to do where nothing answers under an address as an API does."""
    if ending := _QUESTIONS.search(address.url):
        return f"leave {ending[0]} off the address: {address.url.removesuffix(ending[0])}"
    serves = f"it serves a model {address.model}"
    if address.model == ANY_MODEL:
        serves = "it lists its models under /models"
    is_whole = _VERSION.search(address.url)
    ends = "" if is_whole else f", which most APIs end in their version ({address.url}/v1)"
    return f"check the address{ends}, and that {serves}"


def remedy(status: int, address: Address) -> str:
    """What to do after a refusal with some HTTP status."""
    if status in (401, 403):
        own_url, variable = SERVICES[address.dialect]
        named = f" or {variable}" if address.url == own_url else ""
        return f"put a key that this API accepts into the variable {KEY_VARIABLE}{named}"
    if status in (404, 405):
        return of_the_address(address)
    if status in (402, 429):
        return "add credit, or wait; the same command goes on with the answers that have come"
    return "see `trimtab hosts probe` for what this API understands"


def after_failures(address: Address, answered: int, *, cache: bool) -> str:
    """What to do when an API has failed at every attempt.

    Args:
        address: Where.
        answered: Calls that it has answered before.
        cache: Answers are kept.
    """
    if answered:
        kept = ": the same command goes on with the answers that have come"
        return f"try again later{kept if cache else ''}"
    if address.url == SERVICES[address.dialect][0]:
        return "check the network; for a server of your own give its address with --api-url"
    return "check the address and its port, and that the server runs"
