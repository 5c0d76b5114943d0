"""Which predictors a way of steering weighs against each other. Pure."""

from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor

from trimtab.config import CarrierName
from trimtab.store.adapter_schema import Blend

SOURCE_HOST_PRIOR = 0.95
"""Trust before any evidence in a host that writes a target from a source.

It knows what the carriers cannot, and each target begins anew without evidence. A mixture costs at
most -log2 of this prior more than the host: a fourteenth of a bit a target, where an even one would
cost a bit each time.
"""

SMALL_ROWS = ("reference", "expert")
"""Of the small models alone."""

LIVE_ROWS = ("live", "live+head", "live+memory", "all", "proxy", "proxy-0.5", "mixture")
"""In which the small models run beside the host."""

TEMPERATURES = (0.8, 0.9, 1.1, 1.25)
"""Of the control that only makes the host more or less sure."""


def with_memory(base: str, blend: Blend) -> dict[str, float]:
    """Predictors that mix a memory into another predictor: the gate's shift by name.

    Args:
        base: Name of the other predictor; `host` gives `memory`.
        blend: The adapter's.
    """
    name = "memory" if base == "host" else f"{base}+memory"
    return {f"{name}{shift:+g}" if shift else name: shift for shift in blend.gate_shifts}


def families(blend: Blend) -> Mapping[str, tuple[str, ...]]:
    """Predictors of each row that lives on a host, the bare host first among them.

    Args:
        blend: The adapter's.
    """
    memory = tuple(with_memory("host", blend))
    head_memory = tuple(with_memory("head", blend))
    live = ("host", *blend.live)
    bases = blend.live_with_memory
    remembering = tuple(name for base in bases for name in with_memory(base, blend))
    return {
        "host": ("host",),
        "proxy": ("proxy",),
        "proxy-0.5": ("proxy-0.5",),
        "mixture": ("mixture",),
        "temperature": ("host", *(f"temperature-{t:g}" for t in TEMPERATURES)),
        "bias": ("host", "bias-half", "bias-full"),
        "bytes": ("host", *(name.replace("memory", "bytes") for name in memory)),
        "state": ("host", *(name.replace("memory", "state") for name in memory)),
        "head": ("host", "head"),
        "memory": ("host", *memory),
        "head+memory": ("host", "head", *memory, *head_memory),
        "head-shuffled": ("host", "head-shuffled"),
        "memory-shuffled": ("host", *(name.replace("memory", "shuffled") for name in memory)),
        "live": live,
        "live+head": (*live, "head"),
        "live+memory": (*live, *memory, *remembering),
        "all": (*live, *head_memory, *remembering),
    }


def blend_on(blend: Blend, *, reads_source: bool) -> Blend:
    """An adapter's blend on a host.

    Args:
        blend: The adapter's.
        reads_source: Whether the host writes a target from a source, which the carriers never read.
    """
    if not reads_source:
        return blend
    return blend.model_copy(update={"host_prior": max(blend.host_prior, SOURCE_HOST_PRIOR)})


def base_of(name: str, blend: Blend) -> tuple[str, CarrierName] | None:
    """The predictor that one was made from, and the carrier that made it; None for the host.

    Args:
        name: Of a predictor that may steer a generation.
        blend: The adapter's.
    """
    if name == "host":
        return None
    if name == "head":
        return "host", "head"
    if name in blend.live:
        return "host", "expert"
    for base in ("host", "head", *blend.live_with_memory):
        if name in with_memory(base, blend):
            return base, "memory"
    raise ValueError(f"{name} is no predictor of a generation")


def row_of(carriers: Collection[CarrierName]) -> str:
    """The row in which some carriers, at least one, steer together."""
    light = "+".join(name for name in ("head", "memory") if name in carriers)
    if "expert" not in carriers:
        return light
    return {"": "live", "head+memory": "all"}.get(light, f"live+{light}")


def present(row: str, names: Sequence[str], there: Collection[str]) -> tuple[str, ...]:
    """The predictors of a row that are there; none where the row would be another one.

    Args:
        row: Name of the row.
        names: Its predictors.
        there: Predictors that could be computed.
    """
    parts = {"live": ("live",), "all": ("live", "head+memory")}.get(row, ())
    if "+" in row:
        parts = tuple(row.split("+"))
    found = tuple(name for name in names if name in there)
    # A predictor that needs a part stands for it; "head+memory" without a memory would be "head".
    for part in parts:
        sign = "".join(names[1:2]) if part == "live" else part
        if not any(name.startswith(sign) for name in found):
            return ()
    return found if row == "host" or found != ("host",) else ()


def prior_of(members: Sequence[str], blend: Blend) -> Tensor:
    """Trust in each predictor before any evidence, shape [members].

    Args:
        members: Names, `host` among them unless there is one only.
        blend: The adapter's, which says how far the bare host is trusted; others share the rest.
    """
    if len(members) == 1:
        return torch.ones(1)
    others = (1.0 - blend.host_prior) / (len(members) - 1)
    return torch.tensor([blend.host_prior if m == "host" else others for m in members])
