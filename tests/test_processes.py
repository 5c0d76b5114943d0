"""Work shared by copies of a process: done once, whoever fails, and nothing goes on without it."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import faiss
import pytest
import torch

from trimtab.processes import PROCESS_BYTES, Piece, do_pieces, process_count
from trimtab.types import Advance

HERE = os.getpid()


def piece(path: Path, work: Callable[[], object] = lambda: None) -> Piece:
    """Writes who did it, unless somebody has."""

    def do(advance: Advance) -> None:
        if not path.exists():
            work()
            time.sleep(0.02)
            path.write_text(str(os.getpid()))
        advance(3)

    return Piece(do, 3)


def in_a_copy(work: Callable[[], object]) -> None:
    if os.getpid() != HERE:
        work()


def test_several_processes_do_each_piece_once(tmp_path: Path) -> None:
    threads, advanced = torch.get_num_threads(), []
    begun = [tmp_path / f"begun-{place}" for place in range(12)]
    pieces = [piece(tmp_path / str(p), begun[p].touch) for p in range(12)]
    do_pieces(pieces, advanced.append, 3)
    who = {(tmp_path / str(place)).read_text() for place in range(12)}
    assert len(who) == 3 and str(os.getpid()) in who
    assert sum(advanced) == 36
    assert torch.get_num_threads() == threads and not multiprocessing.active_children()


def test_every_process_has_one_thread(tmp_path: Path) -> None:
    threads = torch.get_num_threads()

    def found() -> tuple[int, int]:
        return torch.get_num_threads(), faiss.omp_get_max_threads()

    def told(place: int) -> Piece:
        path = tmp_path / str(place)
        return piece(path, lambda: path.with_suffix(".threads").write_text(str(found())))

    try:
        torch.set_num_threads(2)
        before = found()
        do_pieces([told(place) for place in range(8)], lambda _: None, 2)
        assert {path.read_text() for path in tmp_path.glob("*.threads")} == {"(1, 1)"}
        assert len({path.read_text() for path in tmp_path.glob("?")}) == 2
        assert found() == before
    finally:
        torch.set_num_threads(threads)


def test_a_copy_computes_after_threads_were_used(tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        values = torch.randn(400, 400)
        expected = values @ values  # starts the threads that a copy does not have

        def multiply() -> None:
            assert torch.allclose(values @ values, expected, atol=1e-3)

        pieces = [piece(tmp_path / str(place), multiply) for place in range(8)]
        do_pieces(pieces, lambda _: None, 2)
    finally:
        torch.set_num_threads(threads)
    assert len({path.read_text() for path in tmp_path.iterdir()}) == 2


@pytest.mark.parametrize(
    "end", [lambda: os.kill(os.getpid(), signal.SIGKILL), lambda: 1 / 0], ids=["killed", "failed"]
)
def test_what_a_copy_leaves_undone_is_done_here(tmp_path: Path, end: Callable[[], object]) -> None:
    advanced = []
    pieces = [piece(tmp_path / str(place), lambda: in_a_copy(end)) for place in range(8)]
    do_pieces(pieces, advanced.append, 3)
    assert {path.read_text() for path in tmp_path.iterdir()} == {str(os.getpid())}
    assert len(list(tmp_path.iterdir())) == 8 and sum(advanced) == 24


def test_the_progress_of_copies_is_shown_while_they_work(tmp_path: Path) -> None:
    advanced: list[int] = []

    def do(advance: Advance) -> None:
        if os.getpid() != HERE:
            advance(1)
            (tmp_path / "one").touch()
            waiting((tmp_path / "shown").exists)
            advance(1)
            return
        waiting((tmp_path / "one").exists)
        advance(2)
        assert sum(advanced) == 3
        (tmp_path / "shown").touch()

    do_pieces([Piece(do, 2), Piece(do, 2)], advanced.append, 2)
    assert sum(advanced) == 4


@pytest.mark.parametrize("count", [1, 2])
def test_a_piece_that_tells_nothing_counts_when_it_is_done(count: int) -> None:
    advanced: list[int] = []
    do_pieces(
        [Piece(lambda _: None, 2), Piece(lambda advance: advance(3), 3)], advanced.append, count
    )
    assert sum(advanced) == 5


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_an_error_ends_the_copies(tmp_path: Path, error: type[BaseException]) -> None:
    def fail() -> None:
        if os.getpid() == HERE:
            raise error
        time.sleep(60)

    pieces = [piece(tmp_path / str(place), fail) for place in range(4)]
    with pytest.raises(error):
        do_pieces(pieces, lambda _: None, 3)
    assert not multiprocessing.active_children()


def test_copies_end_with_a_process_that_is_killed(tmp_path: Path) -> None:
    code = """
import os, sys, time
from pathlib import Path
from trimtab.processes import Piece, do_pieces

def do(advance):
    (Path(sys.argv[1]) / str(os.getpid())).touch()
    time.sleep(60)

do_pieces([Piece(do, 1)] * 3, lambda _: None, 3)
"""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    child = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], env=environment)
    waiting(lambda: len(list(tmp_path.iterdir())) == 3)
    child.kill()
    child.wait()
    waiting(lambda: not any(Path(f"/proc/{path.name}").exists() for path in tmp_path.iterdir()))


def waiting(until: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not until():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_processes_are_as_many_as_threads_pieces_and_memory_allow(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    threads = torch.get_num_threads()
    monkeypatch.setattr("trimtab.processes.free_memory_bytes", lambda: 3 * PROCESS_BYTES)
    # An accelerator in use is not shared.
    monkeypatch.setattr("torch.cuda.is_initialized", lambda: False)
    try:
        counts = {}
        for wanted in (1, 2, 4, 5):
            torch.set_num_threads(wanted)
            counts[wanted] = [process_count([7] * pieces, None) for pieces in (1, 4, 100)]
    finally:
        torch.set_num_threads(threads)
    # Where not every thread gets a process, one process with all of them is faster.
    assert counts == {1: [1, 1, 1], 2: [1, 2, 2], 4: [1, 4, 4], 5: [1, 1, 1]}
    assert [process_count([7] * pieces, 3) for pieces in (0, 1, 2, 9)] == [1, 1, 2, 3]


def test_processes_do_not_share_what_one_of_them_would_wait_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("torch.cuda.is_initialized", lambda: False)
    monkeypatch.setattr("torch.get_num_threads", lambda: 2)
    counts = {
        sizes: process_count(sizes, None)
        for sizes in [(60, 25, 15), (50, 25, 25), (55, 45), (56, 44), (10, 10, 10, 25), ()]
    }
    # 60 of 100 in one piece: the other process would wait for a sixth of the time.
    assert list(counts.values()) == [1, 2, 2, 1, 1, 1]
    assert process_count((60, 25, 15), 2) == 2, "as the user wishes"
