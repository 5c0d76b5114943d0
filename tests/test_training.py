"""The schedule against torch's, the loss against a loop, steps that never fail silently."""

import math
from pathlib import Path

import pytest
import torch

from trimtab.backends.open import open_model
from trimtab.errors import InputError
from trimtab.losses import Loss, entropy_adaptive_nats, masked_cross_entropy_nats
from trimtab.text.packing import TokenisedDocument, Windows, pack
from trimtab.tuning.schedule import Schedule, one_cycle
from trimtab.tuning.training import Checkpoints, Learner, TrainingState, train


@pytest.mark.parametrize("steps", [4, 5, 26, 300])
def test_one_cycle_is_torchs(steps: int) -> None:
    optimiser = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1)
    theirs = torch.optim.lr_scheduler.OneCycleLR(optimiser, max_lr=3e-4, total_steps=steps)
    for step in range(steps):
        expected = optimiser.param_groups[0]["lr"]
        assert one_cycle(step, steps, 3e-4) == pytest.approx(expected, rel=1e-9, abs=1e-16)
        optimiser.step()
        theirs.step()


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_short_runs_learn_too(steps: int) -> None:
    assert one_cycle(0, steps, 1e-3) == pytest.approx(1e-3)


def schedule(**changes: int) -> Schedule:
    numbers = {
        "windows": 23,
        "windows_per_epoch": 23,
        "batch_windows": 4,
        "epochs": 2,
        "validations": 3,
        "patience": 2,
        "seed": 5,
    }
    return Schedule(**(numbers | changes), peak=1e-3)


def test_an_epoch_takes_each_window_once_in_its_own_order() -> None:
    plan = schedule()
    epochs = [torch.cat([plan.rows(s) for s in range(6 * n, 6 * n + 6)]) for n in (0, 1)]
    assert plan.steps == 12
    for rows in epochs:
        assert sorted(rows.tolist()) == list(range(23))
    assert not torch.equal(*epochs)
    assert not torch.equal(epochs[0], torch.cat([schedule(seed=6).rows(s) for s in range(6)]))


def test_an_epoch_of_fewer_windows_draws_from_all() -> None:
    plan = schedule(windows_per_epoch=5, epochs=40)
    assert plan.steps_per_epoch == 2
    seen = torch.cat([plan.rows(step) for step in range(plan.steps)])
    assert set(seen.tolist()) == set(range(23))


@pytest.mark.parametrize("validations", [0, 1, 2, 3, 6, 50])
def test_validations_are_spread_and_the_last_ends_the_epoch(validations: int) -> None:
    plan = schedule(validations=validations)
    due = [steps for steps in range(1, 13) if plan.validates_after(steps)]
    assert len(due) == 2 * min(validations, 6)
    assert not due or {6, 12} <= set(due)


def test_cross_entropy_against_a_loop() -> None:
    generator = torch.Generator().manual_seed(1)
    logits = 20 * torch.randn(2, 5, 7, generator=generator)
    targets = torch.randint(0, 7, (2, 5), generator=generator)
    counted = torch.rand(2, 5, generator=generator) < 0.5
    total = 0.0
    for row in range(2):
        for column in range(5):
            if counted[row, column]:
                exps = [math.exp(x) for x in logits[row, column].double().tolist()]
                total -= math.log(exps[targets[row, column]] / sum(exps))
    found = masked_cross_entropy_nats(logits, targets, counted)
    assert found.item() == pytest.approx(total, rel=1e-5)
    assert masked_cross_entropy_nats(logits, targets, counted & False).item() == 0


def learner_and_windows(loss: Loss = masked_cross_entropy_nats) -> tuple[Learner, Windows]:
    model = open_model("tiny:llama?hidden=16&layers=1&heads=2", dtype="float32")
    ids = model.encode("const x = 1;\n" * 20)
    packed = pack([TokenisedDocument(ids, [True] * len(ids), [1] * len(ids))], window_tokens=32)
    vocab = len(model.vocabulary)
    return Learner(model.model, vocab=vocab, arithmetic=torch.float32, loss=loss), packed


@pytest.mark.parametrize("loss", [masked_cross_entropy_nats, entropy_adaptive_nats])
def test_a_batch_in_parts_takes_the_same_step(monkeypatch: pytest.MonkeyPatch, loss: Loss) -> None:
    results = []
    for elements in (2**26, 1):
        monkeypatch.setattr("trimtab.tuning.training._LOGIT_ELEMENTS", elements)
        learner, windows = learner_and_windows(loss)
        nats = learner.step(windows.rows(slice(0, 3)), 1e-3, seed=0)
        results.append((nats, learner.weights()))
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-6)
    for whole, parts in zip(results[0][1], results[1][1], strict=True):
        torch.testing.assert_close(whole, parts, rtol=1e-4, atol=1e-6)


def test_a_step_that_is_not_finite_leaves_the_weights() -> None:
    learner, windows = learner_and_windows()
    with torch.no_grad():
        learner.parameters[0][ord("x")] = math.inf
    before = learner.weights()
    assert math.isnan(learner.step(windows.rows(slice(0, 2)), 1e-3, seed=0))
    for old, new in zip(before, learner.weights(), strict=True):
        assert torch.equal(old, new)


def trained(path: Path, stop: str = "") -> list[torch.Tensor]:
    """The weights after six steps; one that is stopped begins its fifth and goes no further."""
    learner, windows = learner_and_windows()
    plan = schedule(windows=len(windows), windows_per_epoch=len(windows), batch_windows=1, epochs=1)
    assert plan.steps >= 6
    changing, steps = learner._optimiser.step, 0  # pyright: ignore[reportPrivateUsage]

    def counted(parts: Windows) -> list[Windows]:
        nonlocal steps
        # Steps ask, and validations.
        steps += learner._model.training  # pyright: ignore[reportPrivateUsage]
        if stop == "early" and steps == 5:
            raise KeyboardInterrupt
        return [parts]

    def changed() -> None:
        changing()
        if stop == "late" and steps == 5:
            raise KeyboardInterrupt

    learner._parts = counted  # type: ignore[method-assign]
    learner._optimiser.step = changed  # type: ignore[method-assign]
    train(
        learner,
        windows,
        windows.rows(slice(0, 1)),
        plan,
        checkpoints=Checkpoints(path, 1e9),
        advance=lambda _: None,
    )
    return learner.weights()


@pytest.mark.parametrize("stop", ["early", "late"])
def test_ctrl_c_saves_what_is_whole(stop: str, tmp_path: Path) -> None:
    whole, path = trained(tmp_path / "never.safetensors"), tmp_path / "state.safetensors"
    with pytest.raises(KeyboardInterrupt):
        trained(path, stop)
    # Weights of which a step has changed some are no state to continue from.
    assert path.exists() == (stop == "early")
    if path.exists():
        assert learner_and_windows()[0].load(path).step == 4
    for ours, theirs in zip(trained(path), whole, strict=True):
        assert torch.equal(ours, theirs)


def test_a_broken_or_foreign_checkpoint_is_an_input_error(tmp_path: Path) -> None:
    learner, windows = learner_and_windows()
    learner.step(windows.rows(slice(0, 2)), 1e-3, seed=0)
    learner.save(tmp_path / "state.safetensors", TrainingState(step=1))
    whole = (tmp_path / "state.safetensors").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(whole[:-7])
    with pytest.raises(InputError, match=r"cut\.safetensors cannot be continued"):
        learner.load(tmp_path / "cut.safetensors")
    other = open_model("tiny:llama?hidden=32&layers=1&heads=2", dtype="float32")
    foreign = Learner(other.model, vocab=len(other.vocabulary), arithmetic=torch.float32)
    with pytest.raises(InputError, match="cannot be continued"):
        foreign.load(tmp_path / "state.safetensors")
