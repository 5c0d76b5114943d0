"""The adapter that is exchanged, taken away and brought back while requests run."""

import asyncio
import time
from collections.abc import Mapping
from pathlib import Path
from typing import final

import httpx2

State = str | None
"""Which adapter the name stands for; None where it stands for nothing."""


@final
class Swaps:
    """Exchanges an adapter, and remembers what its name may have meant at what time."""

    def __init__(self, client: httpx2.AsyncClient, folders: Mapping[str, Path], state: State):
        """Begin in a state.

        Args:
            client: Asks with a key that may administer.
            folders: Of the adapters, by state.
            state: As the server was started.
        """
        self.count = 0
        self.faults: list[str] = []
        self._client = client
        self._folders = folders
        self._history: list[tuple[float, frozenset[State]]] = [(0.0, frozenset({state}))]

    def between(self, begin_sec: float, end_sec: float) -> frozenset[State]:
        """What the name may have meant in a time."""
        found: frozenset[State] = frozenset()
        ends = [*(since for since, _ in self._history[1:]), float("inf")]
        for (since_sec, states), until_sec in zip(self._history, ends, strict=True):
            if since_sec <= end_sec and until_sec >= begin_sec:
                found |= states
        return found

    async def to(self, state: State) -> None:
        """Exchange the adapter."""
        (*_, (_, before)) = self._history
        # While the server is at it, either may be met with.
        self._history.append((time.monotonic(), before | {state}))
        if state is None:
            found = await self._client.delete("/admin/adapters/swap")
        else:
            body = {"name": "swap", "path": str(self._folders[state])}
            found = await self._client.post("/admin/adapters", json=body)
        if found.status_code != 200:
            self.faults.append(f"swap to {state} was told {found.status_code}: {found.text[:300]}")
        self._history.append((time.monotonic(), frozenset({state})))
        self.count += 1

    def restarted(self, state: State) -> None:
        """The server has begun anew."""
        self._history.append((time.monotonic(), frozenset({state})))

    async def keep_on(self, pause_sec: float) -> None:
        """Exchange until cancelled."""
        while True:
            for state in ("two", None, "one"):
                await self.to(state)
                await asyncio.sleep(pause_sec if state else pause_sec / 4)
