"""Work that is done behind the caller's back: in a thread, in order, one piece at a time."""

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager

Do = Callable[[Callable[[], object]], object]
"""Does a piece of work, now or later."""


@contextmanager
def one_behind() -> Iterator[Do]:
    """Give a function that has each piece of work done while its caller goes on.

    A call waits for the piece before, so that no more than one is under way beside what its caller
    makes next. What a piece raises, the next call raises, or the end of the context. Where that is
    left early, as by Ctrl-C, the piece under way is done to its end all the same.
    """
    with ThreadPoolExecutor(max_workers=1) as thread:
        under_way = list[Future[object]]()

        def do(work: Callable[[], object]) -> None:
            finish()
            under_way.append(thread.submit(work))

        def finish() -> None:
            if under_way:
                under_way.pop().result()

        yield do
        finish()
