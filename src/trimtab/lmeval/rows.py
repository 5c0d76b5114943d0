"""The rows of a report as models of lm-evaluation-harness."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

from trimtab.backends.hf import HFModel
from trimtab.backends.pair import Pair
from trimtab.errors import InputError
from trimtab.lmeval.model import SteeredLM
from trimtab.steering.evidence import Mixture
from trimtab.steering.predictors import Steering
from trimtab.steering.rows import LIVE_ROWS, SMALL_ROWS
from trimtab.types import Progress

_CONTROLS = {"head-shuffled": "head-shuffled", "memory-shuffled": "shuffled"}


@dataclass(frozen=True)
class Models:
    """What rows are made of.

    Attributes:
        host: The host.
        steering: What may steer it.
        pair: Expert and reference, where a row needs them.
        batch_size: Requests that a model reads at once.
    """

    host: HFModel
    steering: Steering
    pair: Pair | None
    batch_size: int

    @contextmanager
    def row(self, name: str, progress: Progress) -> Iterator[SteeredLM]:
        """The model of a row, for as long as the context lasts.

        Raises:
            InputError: The adapter lacks a carrier that the row needs.
        """
        if name in SMALL_ROWS and self.pair:
            if name == "reference":
                yield SteeredLM(self.pair.reference, batch_size=self.batch_size, progress=progress)
                return
            with self.pair.as_expert() as expert:
                yield SteeredLM(expert, batch_size=self.batch_size, progress=progress)
            return
        mixture = None if name == "host" else self._mixture(name)
        yield SteeredLM(self.host, mixture, batch_size=self.batch_size, progress=progress)

    def _mixture(self, row: str) -> Mixture:
        parts = ("head", "memory", "live") if row == "all" else tuple(row.split("+"))
        found = self.steering
        heads = {name: head for name, head in found.heads.items() if name in parts}
        wanted = {_CONTROLS.get(part, part) for part in parts}
        memories = {name: memory for name, memory in found.memories.items() if name in wanted}
        live = found.live if row in LIVE_ROWS else None
        there = {*heads, *memories, "temperature"} | ({*LIVE_ROWS} if live else set())
        there |= {"bias"} if found.bias is not None else set()
        if wanted - there:
            raise InputError(
                f"the adapter has no carrier for the row {row}",
                hint="ask for other --rows, or make the carrier with `trimtab fit`",
            )
        return Mixture(replace(found, rows=(row,), heads=heads, memories=memories, live=live))
