"""Pieces of work whose results are kept on disk, shared by several processes.

Small models fill a core each better than they fill several together: on two cores two processes of
one thread score text 1.3 times as fast as one of two threads (docs/log.md, 2026-11-26).
"""

import heapq
import os
import signal
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from ctypes import c_bool, c_int64
from dataclasses import dataclass
from multiprocessing import connection, current_process, get_context, parent_process
from multiprocessing.process import BaseProcess
from multiprocessing.sharedctypes import RawArray
from threading import Thread
from typing import final

import faiss
import torch

from trimtab.machine import free_memory_bytes
from trimtab.types import Advance

PROCESS_BYTES = 2 * 2**30
"""Free memory that each further process wants: models are shared, what they compute is not."""

MOST_WAITING = 1.1
"""How much longer than an equal share the busiest process may take; more than that costs what
processes of one thread gain over one of several (1.05 to 1.3 times, docs/log.md, 2026-11-26)."""

_TOKENIZERS = "TOKENIZERS_PARALLELISM"
_NUMBER_BYTES = 8
# A pipe holds 64 kB before its writer must wait.
_MOST_AT_ONCE = 2**16 // _NUMBER_BYTES
_LOOK_EVERY_SEC = 0.5


@dataclass(frozen=True)
class Piece:
    """A piece of work that leaves its result on disk, whole or not at all.

    Attributes:
        do: Does it, and tells how far it is; done again it finds the result.
        size: Its size in the units of the progress.
    """

    do: Callable[[Advance], object]
    size: int


def process_count(sizes: Sequence[int], asked: int | None) -> int:
    """How many processes of one thread share some pieces of work; 1 where they would not pay.

    Args:
        sizes: How large the pieces are, in the order in which they are taken.
        asked: What the user wishes; by default as many as torch has threads, if there is memory
            for all and none waits long for the last, or else one with all the threads. An
            accelerator that is in use is not shared, and only Linux copies a process safely.
    """
    if (
        not sys.platform.startswith("linux")
        or torch.cuda.is_initialized()
        or current_process().daemon
    ):
        return 1
    if asked is not None:
        return max(1, min(asked, len(sizes)))
    threads = torch.get_num_threads()
    room = 1 + free_memory_bytes() // PROCESS_BYTES
    pays = _longest(sizes, threads) * threads <= MOST_WAITING * sum(sizes)
    return threads if threads <= min(len(sizes), room) and pays else 1


def _longest(sizes: Sequence[int], count: int) -> int:
    """What the busiest of some processes does, where each takes the next piece when it is free."""
    done = [0] * count
    for size in sizes:
        heapq.heapreplace(done, done[0] + size)
    return max(done)


def do_pieces(pieces: Sequence[Piece], advance: Advance, count: int) -> None:
    """Do all pieces, this process and copies of it each taking the next.

    Each has one thread, this process too, so that results do not depend on who did what. What a
    copy leaves undone (it was killed, or it failed) this process does in the end, and its error is
    the real one. Copies end with this process, however it ends.

    Args:
        pieces: The work; the largest first leave the shortest wait at the end.
        advance: Shows progress.
        count: How many processes, of `process_count` for all pieces of a job, those that were
            done before too, so that the rest is computed in the same way; 1 uses all threads.
    """
    for start in range(0, len(pieces), _MOST_AT_ONCE):
        some = pieces[start : start + _MOST_AT_ONCE]
        if count == 1:
            _do_alone(some, advance)
        else:
            _share(some, advance, min(count, len(some)))


def _do_alone(pieces: Sequence[Piece], advance: Advance) -> None:
    board = _Board(pieces, advance)
    for number in range(len(pieces)):
        board.do(number)


def _share(pieces: Sequence[Piece], advance: Advance, count: int) -> None:
    with _queue(len(pieces)) as queue, _one_thread():
        board = _Board(pieces, advance)

        def work() -> None:
            while (number := _next(queue)) is not None:
                board.do(number)

        with _copies(count - 1, work) as copies:
            work()
            while any(copy.is_alive() for copy in copies):
                connection.wait([copy.sentinel for copy in copies], _LOOK_EVERY_SEC)
                board.show()
        for number in board.undone():
            board.do(number)


@final
class _Board:
    """What is done of each piece, in memory that all processes see; an entry has one writer."""

    def __init__(self, pieces: Sequence[Piece], advance: Advance) -> None:
        self._pieces, self._advance = pieces, advance
        self._units = RawArray(c_int64, len(pieces))
        self._is_done = RawArray(c_bool, len(pieces))
        self._shown = [0] * len(pieces)
        self._process = os.getpid()

    def do(self, number: int) -> None:
        """Do a piece, and let the first process show what all have done meanwhile."""
        self._units[number] = 0

        def advance(units: int) -> None:
            self._units[number] += units
            self.show()

        self._pieces[number].do(advance)
        self._is_done[number] = True
        self.show()

    def undone(self) -> list[int]:
        """Pieces that nobody has done to the end."""
        return [number for number, is_done in enumerate(self._is_done) if not is_done]

    def show(self) -> None:
        """Advance by what is done and was not shown yet; in the first process only."""
        if os.getpid() != self._process:
            return
        for number, piece in enumerate(self._pieces):
            units = piece.size if self._is_done[number] else self._units[number]
            if units > self._shown[number]:
                self._advance(units - self._shown[number])
                self._shown[number] = units


@contextmanager
def _queue(count: int) -> Iterator[int]:
    """A pipe that holds the numbers of all pieces: each read takes one, without any lock."""
    reader, writer = os.pipe()
    try:
        with open(writer, "wb", buffering=0) as file:
            file.write(b"".join(i.to_bytes(_NUMBER_BYTES, "big") for i in range(count)))
        yield reader
    finally:
        os.close(reader)


def _next(queue: int) -> int | None:
    number = os.read(queue, _NUMBER_BYTES)
    return int.from_bytes(number, "big") if number else None


@contextmanager
def _one_thread() -> Iterator[None]:
    """One thread here and in copies, which would wait for those that were not copied with them."""
    of_torch, of_faiss = torch.get_num_threads(), faiss.omp_get_max_threads()
    try:
        torch.set_num_threads(1)
        faiss.omp_set_num_threads(1)
        yield
    finally:
        torch.set_num_threads(of_torch)
        faiss.omp_set_num_threads(of_faiss)


@contextmanager
def _copies(count: int, work: Callable[[], None]) -> Iterator[Sequence[BaseProcess]]:
    """Copies of this process that work; ended when the context is left early."""
    context = get_context("fork")
    copies = [context.Process(target=_run_copy, args=(work,), daemon=True) for _ in range(count)]
    before = os.environ.get(_TOKENIZERS)
    try:
        # Its threads are not copied; unless told so, tokenizers warn in each copy.
        os.environ[_TOKENIZERS] = "false"
        with warnings.catch_warnings():
            # Python 3.12 warns of locks that other threads hold; a copy uses none of theirs.
            warnings.simplefilter("ignore", DeprecationWarning)
            for copy in copies:
                copy.start()
    finally:
        os.environ.pop(_TOKENIZERS)
        if before is not None:
            os.environ[_TOKENIZERS] = before
    try:
        yield copies
    finally:
        for copy in copies:
            copy.kill()
            copy.join()


def _run_copy(work: Callable[[], None]) -> None:
    # Ctrl-C goes to all processes of a terminal; the first one ends the others.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    Thread(target=_end_with_parent, daemon=True).start()
    try:
        work()
    finally:
        # Whatever else happens at the end of a process is the first one's to do.
        os._exit(0)


def _end_with_parent() -> None:
    parent = parent_process()
    if parent is not None:
        connection.wait([parent.sentinel])
    os._exit(1)
