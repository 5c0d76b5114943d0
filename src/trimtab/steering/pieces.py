"""Work in pieces, between which whoever runs it may do something else."""

from collections.abc import Generator
from typing import TypeVar

Found = TypeVar("Found")

Pieces = Generator[None, None, Found]
"""Work that yields between its pieces, and returns what it has found."""


def at_once(work: Pieces[Found]) -> Found:
    """Do all of some work, and give what it has found."""
    while True:
        try:
            next(work)
        except StopIteration as end:
            return end.value
