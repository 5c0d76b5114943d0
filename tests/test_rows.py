"""Rows of a measurement: their predictors, and that every row has a name that can be asked for."""

from typing import get_args

import pytest
from pydantic import ValidationError

from trimtab.config import RowName
from trimtab.report.values import ROWS
from trimtab.steering.rows import SMALL_ROWS, families, present, prior_of, with_memory
from trimtab.store.adapter_schema import Blend

ALL = families(Blend())


def test_every_row_can_be_asked_for_and_is_shown() -> None:
    names = {*ALL, *SMALL_ROWS}
    assert names == set(get_args(RowName)) > set(ROWS)


def test_a_memory_stands_once_for_each_shift() -> None:
    blend = Blend(gate_shifts=(-1.0, 0.0, 0.5))
    assert with_memory("host", blend) == {"memory-1": -1.0, "memory": 0.0, "memory+0.5": 0.5}
    assert list(with_memory("head", blend)) == [
        "head+memory-1",
        "head+memory",
        "head+memory+0.5",
    ]


@pytest.mark.parametrize("row", ALL)
def test_the_prior_gives_the_host_its_share(row: str) -> None:
    prior = prior_of(ALL[row], Blend())
    assert float(prior.sum()) == pytest.approx(1)
    if len(ALL[row]) > 1:
        assert ALL[row][0] == "host" and float(prior[0]) == 0.5


@pytest.mark.parametrize(
    ("row", "there", "found"),
    [
        ("host", {"host"}, ("host",)),
        ("head", {"host"}, ()),
        ("head", {"host", "head"}, ("host", "head")),
        ("head+memory", {"host", "head"}, ()),
        ("head+memory", {"host", "memory", "memory-2", "memory+2"}, ()),
        ("live", {"host"}, ()),
        ("all", {"host", "head", "memory", "head+memory"}, ()),
        ("live+memory", {*ALL["live"], "head"}, ()),
        ("live+head", {*ALL["live"], "head"}, (*ALL["live"], "head")),
        ("memory-shuffled", {"host", "shuffled"}, ("host", "shuffled")),
    ],
)
def test_a_row_without_its_parts_is_not_measured(
    row: str, there: set[str], found: tuple[str, ...]
) -> None:
    assert present(row, ALL[row], there) == found


@pytest.mark.parametrize(
    "settings",
    [
        {"gate_shifts": (1.0,)},
        {"gate_shifts": (0.0, 1.0, 1.0)},
        {"live": {"host": (0, 1, 0)}, "live_with_memory": ()},
        {"live": {"a+b": (0, 1, 0)}, "live_with_memory": ()},
        {"live": {"memory-2": (0, 1, 0)}, "live_with_memory": ()},
        {"share": 0},
        {"live_with_memory": ("nothing",)},
    ],
)
def test_a_blend_that_would_mix_up_predictors_is_refused(settings: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        Blend.model_validate(settings)
