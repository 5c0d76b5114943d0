"""Whose request comes next."""

from collections.abc import Sequence
from typing import final


@final
class Turns:
    """Owners of requests take turns by how many answers each has been given.

    Start-time fair queueing (Goyal, Vin and Cheng 1996) with an answer as the unit. An owner who
    begins to wait is taken to have had as much as whoever was served last: nobody saves turns up
    by being away, and a newcomer waits for one request of each other who waits at most.
    """

    def __init__(self) -> None:
        """Begin with nobody."""
        self._given: dict[str, int] = {}
        self._waiting: frozenset[str] = frozenset()
        self._time = 0

    def place(self, waiting: Sequence[str]) -> int:
        """Which of some requests comes next; of an owner's the first.

        Args:
            waiting: Their owners, in the order in which they came, at least one.
        """
        present = frozenset(waiting)
        for owner in present - self._waiting:
            self._given[owner] = max(self._given.get(owner, 0), self._time)
        self._waiting = present
        # Of those who are away, what lies behind the others says nothing any more.
        self._given = {
            owner: count
            for owner, count in self._given.items()
            if owner in present or count > self._time
        }
        return min(range(len(waiting)), key=lambda place: self._given[waiting[place]])

    def give(self, owner: str, answers: int) -> None:
        """Note that answers of an owner begin, whom `place` has seen waiting."""
        self._time = max(self._time, self._given[owner])
        self._given[owner] += answers
