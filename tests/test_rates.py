"""A learning rate is tried out on held-out text, leaves no trace, and is found again."""

from pathlib import Path

import pytest
from test_tune import configuration, contents, corpus, noting, stopped_after

from trimtab.config import TuneConfig
from trimtab.store.expert import RUN_NAME, Trial, read_expert, read_run
from trimtab.tune import tune
from trimtab.tuning import rates
from trimtab.tuning.rates import RATES, chosen_rate, trial_of
from trimtab.tuning.schedule import Schedule

__all__ = ["corpus"]


def schedule(windows: int, *, batch_windows: int = 1, validations: int = 4) -> Schedule:
    return Schedule(windows, windows, batch_windows, 2, validations, 1e-3, 2, 0)


def trying(costs: dict[float, float | None], tried: list[float]) -> "rates.Attempt":
    def attempt(rate: float) -> Trial:
        tried.append(rate)
        return Trial(learning_rate=rate, tokens=1, nats_per_token=costs[rate])

    return attempt


@pytest.mark.parametrize(
    ("costs", "best", "count"),
    [
        ((1.0, 1.1, 0.5), RATES[0], 2),
        ((1.0, 0.9, 0.95), RATES[1], 3),
        ((1.0, 0.9, 0.8), RATES[2], 3),
        ((None, 0.9, 0.95), RATES[1], 3),
        ((1.0, 1.0, 0.5), RATES[0], 2),
        ((None, None, 0.5), RATES[2], 3),
    ],
)
def test_lower_rates_are_tried_for_as_long_as_they_are_better(
    costs: tuple[float | None, ...], best: float, count: int
) -> None:
    by_rate = dict(zip(RATES, costs, strict=True))
    tried: list[float] = []
    assert chosen_rate((), trying(by_rate, tried)) == best
    assert tried == list(RATES[:count])
    # However many an interrupted run has done, the others follow and the answer is the same.
    for done in range(count + 1):
        again: list[float] = []
        before = tuple(map(trying(by_rate, []), RATES[:done]))
        assert chosen_rate(before, trying(by_rate, again)) == best
        assert again == list(RATES[done:count])


def test_a_trial_is_the_beginning_of_the_training_with_an_end_of_its_own() -> None:
    whole = schedule(96)
    short = trial_of(whole, 256)
    assert short is not None
    assert (short.steps, short.windows_per_epoch, short.validations) == (32, 32, 1)
    assert [short.rows(n).tolist() for n in range(32)] == [
        whole.rows(n).tolist() for n in range(32)
    ]
    assert [n for n in range(1, 33) if short.validates_after(n)] == [32]
    assert trial_of(schedule(60), 256) == schedule_of(short, 60, 20)
    large = trial_of(schedule(4_000), 256)
    assert large is not None and large.windows_per_epoch == 32
    # Where steps are long, a trial has eight of them all the same.
    for batch_windows, window_tokens in ((8, 256), (1, 2_048)):
        long = trial_of(schedule(4_000, batch_windows=batch_windows), window_tokens)
        assert long is not None and long.steps == 8
    assert trial_of(schedule(23), 256) is None
    assert trial_of(schedule(96, batch_windows=8), 256) is None
    assert trial_of(schedule(96, validations=0), 256) is None


def schedule_of(short: Schedule, windows: int, per_epoch: int) -> Schedule:
    return Schedule(
        windows, per_epoch, 1, short.epochs, short.validations, short.peak, short.patience, 0
    )


def untold(corpus: Path, out: Path, **changes: object) -> TuneConfig:
    return configuration(corpus, out, learning_rate=None, batch_windows=1, **changes)


def test_the_best_of_the_rates_is_taken_as_if_it_had_been_given(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Too high, best, too low: not what is usual, and not the last one tried.
    monkeypatch.setattr(rates, "RATES", (0.9, 2e-2, 1e-4))
    labels: list[str] = []
    result = tune(untold(corpus, tmp_path / "a"), progress=noting(labels))
    manifest = read_expert(tmp_path / "a")
    best = min(manifest.trials, key=Trial.cost)
    assert manifest.learning_rate == best.learning_rate == 2e-2
    assert manifest.config.learning_rate is None
    assert [t.learning_rate for t in manifest.trials] == [0.9, 2e-2, 1e-4]
    assert f"learning rate {best.learning_rate:g}, the best of" in result.summary()
    tried = [label for label in labels if label.startswith("trying")]
    assert len(tried) == len(manifest.trials) == len(result.trials) > 1
    given = configuration(corpus, tmp_path / "b", learning_rate=best.learning_rate, batch_windows=1)
    assert tune(given).trials == ()
    assert read_expert(tmp_path / "b").learning_rate == best.learning_rate
    assert contents(tmp_path / "b") == contents(tmp_path / "a")
    assert tune(untold(corpus, tmp_path / "a"), progress=noting(again := [])) == result
    assert not [label for label in again if label.startswith(("trying", "tuning"))]


@pytest.mark.parametrize("calls", [5, 30, 45, 60])
def test_a_run_that_ends_among_its_trials_goes_on_there(
    corpus: Path, tmp_path: Path, calls: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rates, "RATES", (2e-2, 1e-4))
    whole = untold(corpus, tmp_path / "whole")
    parted = untold(corpus, tmp_path / "parted", checkpoint_every_sec=0)
    tune(whole)
    with pytest.raises(KeyboardInterrupt):
        tune(parted, progress=stopped_after(calls, "t"))
    run = read_run(parted.out)
    assert (parted.out / RUN_NAME).exists() and run is not None
    labels: list[str] = []
    tune(parted, progress=noting(labels))
    told = [label for label in labels if label.startswith("trying")]
    assert len(told) == len(read_expert(whole.out).trials) - len(run.trials)
    assert any("going on" in label for label in labels)
    assert read_expert(parted.out).trials == read_expert(whole.out).trials
    assert contents(parted.out) == contents(whole.out)


def test_a_rate_at_which_training_fails_is_passed_over(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rates, "RATES", (0.99, 1e-2))
    config = untold(corpus, tmp_path / "a")
    monkeypatch.setattr(
        "trimtab.tuning.training.one_cycle",
        lambda _step, _steps, peak: 1e30 if peak == 0.99 else peak,
    )
    tune(config)
    manifest = read_expert(config.out)
    assert [trial.nats_per_token is None for trial in manifest.trials] == [True, False]
    assert manifest.learning_rate == 1e-2
    tune(configuration(corpus, tmp_path / "b", learning_rate=1e-2, batch_windows=1))
    assert contents(tmp_path / "b") == contents(config.out)


@pytest.mark.parametrize("changes", [{"held_out": 0.0}, {"max_tokens": 32 * 20}])
def test_without_held_out_text_or_enough_text_the_usual_rate_is_taken(
    corpus: Path, tmp_path: Path, changes: dict[str, object]
) -> None:
    config = untold(corpus, tmp_path / "a", **changes)
    tune(config)
    manifest = read_expert(config.out)
    assert manifest.trials == ()
    assert manifest.learning_rate == config.usual_learning_rate == 1e-3
