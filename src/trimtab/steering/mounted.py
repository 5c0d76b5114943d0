"""An adapter that has found its seat on one host."""

from dataclasses import dataclass
from pathlib import Path

from trimtab.anchors import StateMap
from trimtab.carriers.head import MountedHead
from trimtab.carriers.memory import documents_of
from trimtab.carriers.recall import MountedMemory
from trimtab.store.adapter_schema import AdapterManifest

POOR_FIT = 0.5
"""Anchor R^2 below which a user is warned."""

FEW_ANCHORS = 2000
"""Shared token strings below which a user is warned."""


@dataclass(frozen=True)
class Mounted:
    """An adapter seated on one host.

    Attributes:
        manifest: Of the adapter.
        folder: Of the adapter.
        host_ref: The host.
        state_map: How the vocabulary maps the host's states to the small model's.
        paired_positions: Probe positions that the map was calibrated on, 0 if it was not.
        head: The head, if the adapter has one.
        memory: The memory, if the adapter has one.
        probe_documents: The adapter's general text.
    """

    manifest: AdapterManifest
    folder: Path
    host_ref: str
    state_map: StateMap
    paired_positions: int
    head: MountedHead | None
    memory: MountedMemory | None
    probe_documents: tuple[bytes, ...]

    @property
    def domain_documents(self) -> list[bytes]:
        """The training text that the memory holds, if it holds any."""
        if self.memory is None:
            return []
        return documents_of(self.memory.memory.text)[0]

    @property
    def _is_host_fit(self) -> bool:
        return self.manifest.head is not None and self.manifest.head.host is not None

    @property
    def warnings(self) -> tuple[str, ...]:
        """What a user should know about a poor fit, in plain words."""
        found: list[str] = []
        # A head that was fitted on the host itself, and keys that it made, need no map.
        by_map = self.memory is not None and not self.memory.is_own
        if not by_map and (self.head is None or self._is_host_fit):
            return ()
        if self.state_map.r_squared < POOR_FIT:
            found.append(
                f"the vocabularies explain only {self.state_map.r_squared:.0%} of each other:"
                " head and memory will help little here; the expert carrier does not depend on it"
            )
        if not self.paired_positions:
            found.append(
                "the map is not calibrated (--no-moments, or general text in the adapter that is"
                " too short: record without --general, or with more): head and memory help less"
            )
        if self.state_map.shared_tokens < FEW_ANCHORS:
            found.append(
                f"only {self.state_map.shared_tokens} token strings are shared: the map is rough"
            )
        return tuple(found)

    def summary(self) -> str:
        """How well it fits."""
        lines = [
            f"{self.manifest.name} on {self.host_ref}: {self.state_map.shared_tokens:,} shared"
            f" token strings, anchor R^2 {self.state_map.r_squared:.3f},"
            f" calibrated on {self.paired_positions:,} positions",
            *(f"warning: {warning}" for warning in self.warnings),
        ]
        return "\n".join(lines)
