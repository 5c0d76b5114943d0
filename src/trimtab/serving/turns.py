"""Whose request comes next."""

from collections.abc import Collection, Sequence
from typing import final


@final
class Turns:
    """Owners of requests take turns by how many answers each has been given.

    Fair queueing (Nagle 1985; Demers, Keshav and Shenker 1989) with an answer as the unit. What was
    given is forgotten with an owner who has nothing left, and who comes is taken to have had as
    much as the one with the least: nobody saves turns up, and a newcomer waits for one request of
    each other at most.
    """

    def __init__(self) -> None:
        """Begin with nobody."""
        self._given: dict[str, int] = {}

    def place(self, waiting: Sequence[str], running: Collection[str]) -> int:
        """Which of some requests comes next; of an owner's the first.

        Args:
            waiting: Their owners, in the order in which they came, at least one.
            running: Owners of answers in the making.
        """
        present = {*waiting, *running}
        given = {owner: count for owner, count in self._given.items() if owner in present}
        least = min(given.values(), default=0)
        self._given = {owner: given.get(owner, least) for owner in present}
        return min(range(len(waiting)), key=lambda place: self._given[waiting[place]])

    def give(self, owner: str, answers: int) -> None:
        """Note that answers of an owner begin, whom `place` has seen."""
        self._given[owner] += answers
