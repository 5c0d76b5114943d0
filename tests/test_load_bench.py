"""The load generator: what it makes of figures, and how it tells right answers from wrong ones."""

import asyncio
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
from test_generate import adapter as adapter  # a fixture
from test_generate import host as host  # a fixture
from test_serve_engine import served

from bench.load.abuse import send_wrong, wrongs
from bench.load.asks import SWAPPED, Answer, Ask, asks, error_problem
from bench.load.clients import Clients, alone, client_of
from bench.load.figures import growth, leaks, percentiles
from bench.load.swaps import Swaps
from trimtab.backends.hf import HFModel
from trimtab.serving.keys import add_key
from trimtab.serving.run import Running, running

BODY_BYTES = 20_000
LIGHT = {"carriers": ["head"]}


def test_growth_is_seen_through_outliers_and_a_warm_up() -> None:
    chosen = random.Random(0)
    flat = [600e6 + chosen.uniform(-2e6, 2e6) for _ in range(9)]
    flat[3] += 100e6
    assert abs(growth(flat)) < 6e6
    assert growth([value + 10e6 * n for n, value in enumerate(flat)]) == pytest.approx(
        80e6, rel=0.1
    )
    assert growth([5.0]) == 0

    def rests(values: list[float], descriptors: int = 0) -> list[dict[str, float]]:
        return [
            {"rss_bytes": value, "descriptors": 20 + n * descriptors, "threads": 4}
            for n, value in enumerate(values)
        ]

    assert leaks(rests([300e6, 500e6, *flat]), 2) == []
    assert leaks(rests(flat, descriptors=1), 0)
    assert leaks(rests([value + 10e6 * n for n, value in enumerate(flat)]), 0)
    assert leaks(rests(flat), 7), "two rounds say nothing"


def test_percentiles_lie_between_the_values() -> None:
    assert percentiles([float(n) for n in range(101)]) == {
        "count": 101,
        "p50": 50,
        "p95": 95,
        "p99": 99,
    }
    assert percentiles([])["p50"] == 0


def test_answers_differ_by_texts_ends_counts_and_more_than_rounding() -> None:
    one = Answer(("a",), ("stop",), 1, (-1.0,))
    assert one.equals(Answer(("a",), ("stop",), 1, (-1.00001,)))
    for other in (
        Answer(("b",), ("stop",), 1, (-1.0,)),
        Answer(("a",), ("length",), 1, (-1.0,)),
        Answer(("a",), ("stop",), 2, (-1.0,)),
        Answer(("a",), ("stop",), 1, (-1.1,)),
        Answer(("a",), ("stop",), 1, ()),
    ):
        assert not one.equals(other)
    assert error_problem(400, b"Bad Request") and error_problem(400, b'{"detail": "x"}')


def test_asks_are_of_all_kinds_and_the_same_again() -> None:
    found = asks(72)
    assert found == asks(72)
    assert {ask.body["model"] for ask in found} > {"host", "host+sea", SWAPPED}
    assert any(ask.is_chat for ask in found) and any(ask.body.get("n") for ask in found)


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, str]:
    path = tmp_path_factory.mktemp("keys") / "keys.json"
    return path, add_key(path, "user"), add_key(path, "boss", admin=True)


@pytest.fixture(scope="module")
def server(host: HFModel, adapter: Path, keys: tuple[Path, str, str]) -> Iterator[Running]:
    given = [f"{name}={adapter}" for name in ("sea", "swap")]
    config = served(*given, keys=keys[0], slots=2, queue=1, body_bytes=BODY_BYTES)
    with running(config, host=host) as found:
        yield found


def test_every_wrong_request_is_refused_in_json(
    server: Running, keys: tuple[Path, str, str]
) -> None:
    port = int(server.base_url.rpartition(":")[2])

    async def all_of_them() -> list[str]:
        every = wrongs(keys[1], keys[1], BODY_BYTES)
        found = await asyncio.gather(*(send_wrong(port, wrong) for wrong in every))
        return [problem for _, problem in found if problem]

    assert asyncio.run(all_of_them()) == []


def test_clients_find_right_answers_right_and_wrong_ones_wrong(
    server: Running, adapter: Path, keys: tuple[Path, str, str]
) -> None:
    # So much work that all ten clients ask at once, which is more than there is room for, however
    # fast the machine is.
    body = {"prompt": "The keel turns", "temperature": 0, "max_tokens": 16}
    wanted = [Ask("completions", {**body, "model": m}) for m in ("host", SWAPPED)]
    wanted.append(
        Ask(
            "chat/completions",
            {
                **{"model": "host+sea", "temperature": 0, "max_tokens": 16, "trimtab": LIGHT},
                "messages": [{"role": "user", "content": "The keel"}],
            },
        )
    )

    async def run() -> tuple[Clients, Clients, Swaps]:
        async with client_of(server.base_url, keys[1]) as client:
            async with client_of(server.base_url, keys[2]) as boss:
                swaps = Swaps(boss, {"one": adapter, "two": adapter}, "one")
                expected = {}
                for number, ask in enumerate(wanted):
                    answer, _ = await alone(client, ask)
                    expected |= {(number, state): answer for state in ("one", "two")}
                right = Clients(client, wanted, expected, swaps)
                swapping = asyncio.create_task(swaps.keep_on(0.1))
                await right.run(10, 60, 0)
                swapping.cancel()
                wrong = Clients(client, wanted, {k: Answer((), (), 0, ()) for k in expected}, swaps)
                await wrong.run(1, 3, 1)
                return right, wrong, swaps

    right, wrong, swaps = asyncio.run(run())
    assert right.tally.faults == [] == swaps.faults and swaps.count > 2
    assert right.tally.outcomes["429 queue_full"] and right.tally.outcomes["hung up"]
    assert right.tally.outcomes["answered, streamed"] == len(right.tally.whole_sec) > 5
    assert len(wrong.tally.faults) == wrong.tally.outcomes["wrong answers"] > 0
