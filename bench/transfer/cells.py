"""Is an adapted host as good as LoRA on the host? One paired answer a task: a cell. Pure.

A cell is a task of one run: a pair of models, a domain, a seed. Its items are answered rightly or
wrongly by both rows, so that the bootstrap draws pairs: what both find hard cancels out.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from trimtab.metrics import draws

Outcomes = Sequence[Sequence[bool]]
"""Whether each item is answered rightly, by document; documents are drawn as a whole."""

ADAPTED = "all"
"""The row that is compared: the adapter with all its carriers."""

RIVALS = ("lora-host", "expert", "host")
"""What it is compared with, where that has answered the same items."""

MARGIN_POINTS = 2.0
"""As good is: at most so many percentage points of right items below the rival."""


@dataclass(frozen=True)
class Answered:
    """What rows have answered to the items of a task.

    Attributes:
        items: Fingerprint of the items.
        rows: Outcomes by row.
    """

    items: str
    rows: Mapping[str, Outcomes]


@dataclass(frozen=True)
class Cell:
    """An adapted host against a rival on one task.

    Attributes:
        difference_points: Share of right items, adapted minus rival, in percentage points.
        stderr_points: Its standard error, by bootstrap over documents.
        share: Of the bootstrap's draws, how many put the adapted host at most MARGIN_POINTS below
            the rival.
        items: How many items there are.
        telling: Documents in which one of the two has more right.
    """

    difference_points: float
    stderr_points: float
    share: float
    items: int
    telling: int


def cell(
    adapted: Outcomes, rival: Outcomes, *, seed: int = 0, resamples: int = 2_000
) -> Cell | None:
    """Compare two rows' answers to the same items; None where there are no items.

    Args:
        adapted: The adapted host's.
        rival: The rival's.
        seed: Of the draws.
        resamples: How many draws.

    Raises:
        ValueError: The rows have not answered the same items.
    """
    sizes = np.array([len(document) for document in adapted])
    if [len(document) for document in rival] != sizes.tolist():
        raise ValueError("the rows have not answered the same items")
    if not sizes.sum():
        return None
    gained = np.array(
        [sum(a) - sum(r) for a, r in zip(adapted, rival, strict=True)], dtype=np.float64
    )
    drawn = draws(len(sizes), seed, resamples)
    points = 100 * gained[drawn].sum(1) / np.maximum(sizes[drawn].sum(1), 1)
    return Cell(
        difference_points=float(100 * gained.sum() / sizes.sum()),
        stderr_points=float(points.std()),
        share=float((points >= -MARGIN_POINTS).mean()),
        items=int(sizes.sum()),
        telling=int((gained != 0).sum()),
    )


def cells(tasks: Mapping[str, Mapping[str, Outcomes]]) -> dict[str, dict[str, Cell]]:
    """All cells of a run: by rival, then by task, where both rows have answered.

    Args:
        tasks: Outcomes by task and row.
    """
    found: dict[str, dict[str, Cell]] = {}
    for task, rows in tasks.items():
        for rival in RIVALS:
            if ADAPTED in rows and rival in rows and (one := cell(rows[ADAPTED], rows[rival])):
                found.setdefault(rival, {})[task] = one
    return found


def packed(outcomes: Outcomes) -> str:
    """Outcomes as text: a digit an item, a word a document."""
    return " ".join("".join("01"[bool(right)] for right in document) for document in outcomes)


def unpacked(text: str) -> Outcomes:
    """What `packed` wrote, of at least one document."""
    return [[digit == "1" for digit in word] for word in text.split(" ")]
