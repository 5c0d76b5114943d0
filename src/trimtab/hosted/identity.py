"""Which model answers at an address: told by what it says to one short question."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from trimtab.hosted.address import Address
from trimtab.hosted.answers import Answer, Answers
from trimtab.hosted.capabilities import Capabilities
from trimtab.hosted.host import HostedModel
from trimtab.hosted.requests import Prefix, Wanted, path_and_body
from trimtab.store.files import sha256_bytes, write_json
from trimtab.store.home import read_kept, trimtab_home

SAME_NATS = 0.1
"""Log-probabilities of one model differ by less from call to call, on average over a place's shown
tokens by their probability, whatever the service's arithmetic."""

ATTEMPTS = 2
"""Times that the question is asked before its answer is taken for another model's."""

LONGEST_TOKENS = 16
"""A model that takes no shorter bound on an answer is not asked: it thinks first, at a price."""

_TOKENS, _TOP = 6, 5
_LAST = "last.json"
_SHOWING = ("logprobs", "top_logprobs")
_TEXT, _MESSAGE = "The rudder turns", "Tell me about ships."


class Said(BaseModel):
    """What a model has answered to the question."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    schema_version: Literal[1] = 1
    """Changes whenever a field means something else."""
    asked: str
    """Fingerprint of the question, since services are asked in different words; however many
    log-probabilities are to be shown."""
    text: str
    """The answer."""
    places: tuple[tuple[str, dict[str, float]], ...] = ()
    """The token at each place, and the likeliest there with their natural-log probabilities; none
    where these are not shown."""


class _Last(BaseModel):
    """The model that has answered last at an address."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    schema_version: Literal[1] = 1
    """Changes whenever a field means something else."""
    name: str
    """Told from its first answer."""


Kept = TypeVar("Kept", Said, _Last)


@dataclass(frozen=True)
class Identity:
    """Who answers at an address.

    Attributes:
        name: Tells its answers from those of other models there; empty where no question can
            tell, None where the budget did not allow it, or another model does not understand it.
        is_other: It is not the one that answered there last.
    """

    name: str | None
    is_other: bool = False


def identified(host: HostedModel) -> Identity:
    """Ask which of the models that have answered at an address does now, and remember it.

    Raises:
        ModelError: As for `Client.try_once`.
        StorageError: The answer cannot be kept.
    """
    wanted = _wanted(host.by)
    if wanted is None:
        return Identity("")
    folder = _folder(host.client.address)
    last, models = _last(folder), _models(folder)
    said, name = None, None
    for _ in range(ATTEMPTS):
        if not host.allows(_prefix(host.by), wanted):
            return Identity(None)
        said = _ask(host, wanted)
        name = _name_among(said, models)
        if name is not None or (said is not None and not models):
            break
    if said is None:
        return Identity(None, is_other=True) if last else Identity("")
    if name is None:
        name = sha256_bytes(said.model_dump_json().encode())
        # A file for each: runs that find models at once take nothing from one another.
        write_json(folder / f"{name}.json", said.model_dump(mode="json"))
    if name != last:
        write_json(folder / _LAST, _Last(name=name).model_dump(mode="json"))
    return Identity(name, is_other=last not in ("", name))


def are_alike(one: Said, other: Said) -> bool:
    """Whether two answers may be one model's.

    Log-probabilities are compared at each place that has the same text before it in both; without
    them the texts must be equal.
    """
    if one.asked != other.asked:
        return False
    apart = []
    for (chosen, ours), (also, theirs) in zip(one.places, other.places, strict=False):
        # Some services show nothing of the token that ends a text.
        if ours and theirs:
            apart.append(_apart_nats(ours, theirs))
        if chosen != also:
            break
    return fmean(apart) < SAME_NATS if apart else one.text == other.text


def _apart_nats(ours: Mapping[str, float], theirs: Mapping[str, float]) -> float:
    """Mean difference of log-probabilities, by probability; infinite where the tokens are others.

    Args:
        ours: Of the likeliest tokens, at least one.
        theirs: The same of another answer.
    """
    count = min(len(ours), len(theirs))
    shared = _likeliest(ours, count) & _likeliest(theirs, count)
    if 2 * len(shared) < count:
        return math.inf
    weights = {name: math.exp(ours[name]) + math.exp(theirs[name]) for name in shared}
    apart = math.fsum(weight * abs(ours[n] - theirs[n]) for n, weight in weights.items())
    total = math.fsum(weights.values())
    return apart / total if total else math.inf


def _likeliest(shown: Mapping[str, float], count: int) -> set[str]:
    return set(sorted(shown, key=lambda name: -shown[name])[:count])


def _name_among(said: Said | None, models: Mapping[str, Said]) -> str | None:
    if said is None:
        return None
    return next((name for name, before in models.items() if are_alike(said, before)), None)


def _wanted(by: Capabilities) -> Wanted | None:
    """What the question asks for; None where no answer would tell."""
    # Names in Anthropic's dialect stand for one model each, whose texts differ from call to call.
    if by.dialect == "anthropic" or by.shortest_tokens > LONGEST_TOKENS:
        return None
    top = by.top_completions if by.completions else by.top_chat
    if not top and not by.takes_temperature:
        return None
    return Wanted(_TOKENS, min(top, _TOP))


def _prefix(by: Capabilities) -> Prefix:
    return Prefix(_TEXT) if by.completions else Prefix("", _MESSAGE)


def _ask(host: HostedModel, wanted: Wanted) -> Said | None:
    """The answer; None where the question is not understood."""
    prefix = _prefix(host.by)
    path, body = path_and_body(host.client.address.model, prefix, wanted, host.by)
    read = host.reader(wanted, is_look=True)
    found = host.client.try_once(path, body, read, estimate=host.estimate(prefix, wanted))
    if not isinstance(found, Answers):
        return None
    host.check_tokens(prefix, found)
    return _said(path, body, found.choices[0])


def _said(path: str, body: Mapping[str, Any], answer: Answer) -> Said:
    words = {key: value for key, value in body.items() if key not in _SHOWING}
    asked = sha256_bytes(json.dumps([path, words], sort_keys=True).encode())
    places = (
        (_writable(place.chosen.name), {_writable(t.name): t.logprob for t in place.top})
        for place in answer.places
    )
    return Said(asked=asked, text=answer.text, places=tuple(places))


def _writable(name: str) -> str:
    # A token may be half of a character, which no file can hold.
    return name.encode(errors="replace").decode()


def _folder(address: Address) -> Path:
    """Where the first answers of the models at an address are kept, by their names."""
    name = json.dumps([address.dialect, address.url, address.model])
    return trimtab_home() / "hosted" / "models" / sha256_bytes(name.encode())


def _last(folder: Path) -> str:
    found = _read(folder / _LAST, _Last)
    return found.name if found else ""


def _models(folder: Path) -> dict[str, Said]:
    paths = (path for path in sorted(folder.glob("*.json")) if path.name != _LAST)
    return {path.stem: said for path in paths if (said := _read(path, Said)) is not None}


def _read(path: Path, kind: type[Kept]) -> Kept | None:
    try:
        return kind.model_validate(read_kept(path))
    except ValidationError:
        return None
