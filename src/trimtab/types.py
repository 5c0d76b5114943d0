"""Values and small interfaces that several stages share. No torch at run time."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

Advance = Callable[[int], None]
"""Says that so many more units of a piece of work are done."""

Progress = Callable[[str, int], AbstractContextManager[Advance]]
"""Opens a progress display: `with progress("tuning", total) as advance: advance(n)`."""

OnText = Callable[[int, str], None]
"""Told the index of a prompt and the next piece of its continuation."""

OnNote = Callable[[str], None]
"""Told what a user should know beside the text, in a sentence."""


@contextmanager
def silent(label: str, total: int) -> Iterator[Advance]:
    """The progress display of library calls: none."""
    del label, total
    yield lambda _: None


@dataclass(frozen=True)
class Document:
    """One text with a stable name.

    Attributes:
        name: Where it came from (path, or path:line); unique within a corpus.
        text: The text; for chat and completion records, the rendered text.
        loss_spans: Character ranges [start, end) that a training loss counts; empty means all.
        markup: The text comes from a chat template, so that the names of special tokens in it
            mean those tokens.
        source: What an encoder-decoder reads to write the text; other models never see it.
    """

    name: str
    text: str
    loss_spans: tuple[tuple[int, int], ...] = ()
    markup: bool = False
    source: str | None = None
