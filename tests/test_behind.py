"""Work in a thread: in order, one piece at a time, nothing half done, and no error lost."""

from threading import Event, get_ident

import pytest

from trimtab.behind import one_behind


def test_one_piece_is_done_while_the_caller_goes_on() -> None:
    said: list[str] = []
    events = {name: Event() for name in "abc"}

    def piece(name: str) -> None:
        assert events[name].wait(60)
        said.append(name)

    with one_behind() as do:
        do(lambda: piece("a"))
        said.append("meanwhile")
        events["a"].set()
        do(lambda: piece("b"))
        assert said == ["meanwhile", "a"]
        events["b"].set()
        do(lambda: piece("c"))
        assert said == ["meanwhile", "a", "b"]
        events["c"].set()
    assert said == ["meanwhile", "a", "b", "c"]


def test_all_is_done_in_one_other_thread() -> None:
    threads = set[int]()
    with one_behind() as do:
        for _ in range(5):
            do(lambda: threads.add(get_ident()))
    assert len(threads) == 1 and get_ident() not in threads


@pytest.mark.parametrize("later", [0, 2])
def test_an_error_is_raised_by_the_next_call_or_at_the_end(later: int) -> None:
    done: list[int] = []
    with pytest.raises(ZeroDivisionError), one_behind() as do:
        do(lambda: 1 / 0)
        for number in range(later):
            do(lambda number=number: done.append(number))
    assert done == []


def test_what_is_under_way_is_done_when_the_caller_is_stopped() -> None:
    stopped, done = Event(), list[str]()

    def piece() -> None:
        assert stopped.wait(60)
        done.append("whole")

    with pytest.raises(KeyboardInterrupt), one_behind() as do:
        do(piece)
        stopped.set()
        raise KeyboardInterrupt
    assert done == ["whole"]
