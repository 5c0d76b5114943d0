"""Where in the training documents a place of a memory's text lies: document and line. Pure."""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import PurePosixPath

from torch import Tensor

_LINE_BREAK = 10


@dataclass(frozen=True)
class Sources:
    """The documents of a memory's text.

    Attributes:
        names: Of each document.
        starts: Where in the text each begins, ascending.
    """

    names: tuple[str, ...]
    starts: tuple[int, ...]


@dataclass(frozen=True)
class Place:
    """A place in a training document.

    Attributes:
        source: Name of the document.
        line: Line of it, counted from 1.
        start: Where in the memory's text the document begins.
    """

    source: str
    line: int
    start: int


def place_of(sources: Sources, text: Tensor, position: int) -> Place:
    """Where a position of a memory's text lies.

    Args:
        sources: The documents; `position` is in one of them or at its end.
        text: Of the memory, uint8, shape [bytes].
        position: Where what followed an entry begins.
    """
    document = max(0, bisect_right(sources.starts, position) - 1)
    start = sources.starts[document]
    return Place(
        sources.names[document], 1 + int((text[start:position] == _LINE_BREAK).sum()), start
    )


def travelling_names(names: Sequence[str]) -> tuple[str, ...]:
    """Names of documents as an adapter carries them: without the folder that all lie in.

    A name that still begins at the root or at a home, or leads out of its folder, says more of a
    machine than of a text: its last part alone is kept.

    Args:
        names: Paths as the user gave them, perhaps with a record's `:LINE` behind.
    """
    parts = [PurePosixPath(name.replace("\\", "/")).parts or (name,) for name in names]
    levels = zip(*(part[:-1] for part in parts), strict=False)
    common = [level[0] for level in takewhile(lambda level: len(set(level)) == 1, levels)]
    # Paths that share the root alone share no folder.
    cut = len(common) if common[-1:] != ["/"] else 0
    return tuple(_portable(part[cut:]) for part in parts)


def _portable(parts: Sequence[str]) -> str:
    is_private = parts[0].startswith(("/", "~")) or parts[0].endswith(":") or ".." in parts
    return parts[-1] if is_private else "/".join(parts)
