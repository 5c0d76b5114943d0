"""Cells of the transfer suite: a paired comparison against drawing by hand, and its file."""

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.transfer.cells import Answered, Cell, cell, cells, packed, unpacked
from bench.transfer.metrics import share_right
from bench.transfer.results import Found, add, outcomes_path
from bench.transfer.table import table

OUTCOMES = st.lists(st.lists(st.booleans(), max_size=4), min_size=1, max_size=5)
KEY = {"pair": "toy", "domain": "toy", "seed": 0, "train_tokens": 1}


@given(OUTCOMES)
def test_outcomes_come_back_from_text(outcomes: list[list[bool]]) -> None:
    assert unpacked(packed(outcomes)) == outcomes


def test_a_cell_against_all_draws_of_three_documents() -> None:
    adapted = [[True, True, False], [False], [True, False]]
    rival = [[True, False, False], [True], [True, True]]
    found = cell(adapted, rival, resamples=40_000)
    assert found is not None and found.telling == 3
    points = []
    for drawn in itertools.product(range(3), repeat=3):
        gained = sum(sum(adapted[i]) - sum(rival[i]) for i in drawn)
        points.append(100 * gained / sum(len(adapted[i]) for i in drawn))
    assert found.difference_points == pytest.approx(100 * (3 - 4) / 6)
    assert found.items == 6
    assert found.share == pytest.approx(np.mean(np.array(points) >= -2), abs=0.01)
    assert found.stderr_points == pytest.approx(np.std(points), rel=0.02)


def test_what_both_rows_find_hard_cancels_out() -> None:
    draw = np.random.default_rng(0)
    rival = [[bool(right)] for right in draw.random(300) < 0.6]
    assert cell(rival, rival) == Cell(0.0, 0.0, 1.0, 300, 0)
    # One item in ten is lost: 300 items are enough to be sure that it is more than two points.
    adapted = [[one and number % 10 != 0] for number, (one,) in enumerate(rival)]
    found = cell(adapted, rival)
    assert found is not None and found.share < 0.05


def test_where_there_are_no_items_nothing_is_said() -> None:
    assert cell([], []) is None and cell([[], []], [[], []]) is None
    assert cells({"a": {"all": [[]], "expert": [[]]}}) == {}


def test_rows_of_other_items_are_refused() -> None:
    with pytest.raises(ValueError, match="same items"):
        cell([[True]], [[True, False]])


def test_only_rows_that_answered_are_compared() -> None:
    tasks = {"a": {"all": [[True]], "expert": [[False]]}, "b": {"all": [[True]]}}
    assert cells(tasks) == {"expert": {"a": Cell(100.0, 0.0, 1.0, 1, 1)}}


def found(items: str, rows: dict[str, list[bool]]) -> Found:
    single = {row: [[one] for one in right] for row, right in rows.items()}
    shares = {row: share_right(right) for row, right in rows.items()}
    return Found(tasks={"right-word": shares}, answered={"right-word": Answered(items, single)})


def test_steps_add_their_rows_and_other_items_replace_them(tmp_path: Path) -> None:
    path = tmp_path / "transfer.json"

    def run() -> dict[str, Any]:
        return json.loads(path.read_text())["runs"][0]

    add(KEY, found("one", {"all": [True, True], "bias": [False, False]}), path)
    assert run()["cells"] == {} and set(run()["tasks"]["right-word"]) == {"all", "bias"}
    add(KEY, found("one", {"lora-host": [True, False]}), path)
    compared = run()["cells"]["lora-host"]["right-word"]
    assert compared["difference_points"] == 50
    # Two items are surely too few to be sure of anything.
    words = "At most 2 points below it in 1 of 1 cells (100 %) by the bootstrap's median"
    assert f"{words}; surely so (at least 95 % of the draws) in 0, surely not in 0." in table(path)
    [kept] = json.loads(outcomes_path(path).read_text())["runs"]
    rows = {"all": "1 1", "lora-host": "1 0"}
    assert kept == {**KEY, "tasks": {"right-word": {"items": "one", "rows": rows}}}
    # Other questions of the same number are other items.
    add(KEY, found("other", {"all": [True, False]}), path)
    assert run()["cells"] == {} and set(run()["tasks"]["right-word"]) == {"all"}
    add({**KEY, "test_tokens": 9}, found("one", {"all": [True, False]}), path)
    assert len(json.loads(outcomes_path(path).read_text())["runs"]) == 2
