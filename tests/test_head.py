"""The head: nothing at first, LoRA algebra, a planted shift, and seating by token string."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from trimtab.anchors import Reading
from trimtab.carriers.head import Head, MountedHead, seat_rows
from trimtab.errors import InputError, NumericalError
from trimtab.fitting.head import Checkpoint, Compared, HeadData, HeadSettings, fit_head
from trimtab.losses import kl_nats
from trimtab.vocab import Vocabulary

HIDDEN, VOCAB, POSITIONS, RANK = 12, 20, 600, 3


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def rows() -> Tensor:
    return draw(VOCAB, HIDDEN, seed=1)


@pytest.fixture
def planted() -> Head:
    return Head(
        draw(RANK, HIDDEN, seed=2) / HIDDEN**0.5,
        draw(HIDDEN, RANK, seed=3) / HIDDEN**0.5,
        0.2 * draw(HIDDEN, seed=4),
        draw(HIDDEN, seed=5),
    )


def data(rows: Tensor, target: Head, hidden: Tensor, general: int = 0) -> HeadData:
    """Follow `target`, but leave the first `general` positions alone."""

    def logits(batch: Tensor, compared: Tensor) -> tuple[Tensor, Tensor]:
        shift = target.shift(hidden[batch]) * (batch >= general)[:, None]
        chosen = rows[compared]
        return hidden[batch] @ chosen.T, (hidden[batch] + shift) @ chosen.T

    return HeadData(hidden, logits, torch.ones(len(hidden)))


def moments(hidden: Tensor) -> tuple[Tensor, Tensor]:
    return hidden.mean(0), hidden.std(0)


def kl(found: Head, target: Head, rows: Tensor, hidden: Tensor) -> float:
    wanted, ours = ((hidden + head.shift(hidden)) @ rows.T for head in (target, found))
    return float(kl_nats(wanted, ours).mean())


def nothing(head: Head) -> Head:
    return Head(head.down, torch.zeros_like(head.up), torch.zeros_like(head.offset), head.mean)


def test_a_head_starts_as_no_change(rows: Tensor, planted: Head) -> None:
    hidden = draw(40, HIDDEN, seed=6)
    settings = HeadSettings(RANK, epochs=1, learning_rate=0.0, seed=0)
    found = fit_head(data(rows, planted, hidden), rows, moments(hidden), settings)
    assert torch.equal(found.shift(hidden), torch.zeros(40, HIDDEN))
    assert found.down.abs().max() > 0


def test_a_shift_is_a_lora_on_the_unembedding(rows: Tensor, planted: Head) -> None:
    hidden = draw(2, 5, HIDDEN, seed=6)
    lora = (rows @ planted.up) @ planted.down
    bias = rows @ (planted.offset - planted.up @ planted.down @ planted.mean)
    shifted = (hidden + planted.shift(hidden)) @ rows.T
    torch.testing.assert_close(shifted, hidden @ (rows + lora).T + bias)


def test_a_planted_shift_is_found(rows: Tensor, planted: Head) -> None:
    hidden = draw(POSITIONS, HIDDEN, seed=6) * torch.logspace(-1, 1, HIDDEN)
    target = Head(
        planted.down / torch.logspace(-1, 1, HIDDEN), *list(planted.tensors().values())[1:]
    )
    used = []
    found = fit_head(
        data(rows, target, hidden),
        rows,
        moments(hidden),
        HeadSettings(RANK, epochs=60, learning_rate=2e-2, seed=0, batch_positions=100),
        on_batch=used.append,
    )
    fresh = draw(200, HIDDEN, seed=7) * torch.logspace(-1, 1, HIDDEN)
    assert kl(found, target, rows, fresh) < 0.05 * kl(nothing(target), target, rows, fresh)
    assert found.down.shape == (RANK, HIDDEN) and not found.up.requires_grad
    assert sum(used) == 60 * POSITIONS


def test_general_text_is_left_alone(rows: Tensor, planted: Head) -> None:
    hidden = draw(POSITIONS, HIDDEN, seed=6)
    hidden[: POSITIONS // 2, 0] -= 8
    general = HeadSettings(RANK, epochs=30, learning_rate=1e-2, seed=0, batch_positions=100)
    free = fit_head(data(rows, planted, hidden), rows, moments(hidden), general)
    anchored = fit_head(data(rows, planted, hidden, POSITIONS // 2), rows, moments(hidden), general)
    there = hidden[: POSITIONS // 2]
    still = nothing(planted)
    assert kl(anchored, still, rows, there) < 0.3 * kl(free, still, rows, there)


def test_weights_of_zero_do_not_count(rows: Tensor, planted: Head) -> None:
    hidden = draw(100, HIDDEN, seed=6)
    plain = data(rows, planted, hidden)
    ignored = HeadData(hidden, plain.logits, torch.zeros(100))
    settings = HeadSettings(RANK, epochs=3, learning_rate=1e-2, seed=0)
    found = fit_head(ignored, rows, moments(hidden), settings)
    assert torch.equal(found.up, torch.zeros(HIDDEN, RANK))


def test_the_seed_decides(rows: Tensor, planted: Head) -> None:
    hidden = draw(100, HIDDEN, seed=6)
    fitted = [
        fit_head(
            data(rows, planted, hidden),
            rows,
            moments(hidden),
            HeadSettings(RANK, epochs=2, learning_rate=1e-2, seed=seed, batch_positions=30),
        )
        for seed in (0, 0, 1)
    ]
    assert torch.equal(fitted[0].up, fitted[1].up)
    assert not torch.equal(fitted[0].up, fitted[2].up)


@pytest.mark.parametrize("stopped_at", [1, 4, 9])
def test_a_stopped_fit_continues_bit_for_bit(
    stopped_at: int, rows: Tensor, planted: Head, tmp_path: Path
) -> None:
    hidden = draw(100, HIDDEN, seed=6)
    settings = HeadSettings(
        RANK, epochs=3, learning_rate=1e-2, seed=0, batch_positions=30, always=5, drawn=6
    )
    checkpoint = Checkpoint(tmp_path / "head.safetensors", 0.0, "one")
    arguments = (data(rows, planted, hidden), rows, moments(hidden), settings)
    whole = fit_head(*arguments)
    done: list[int] = []

    def stop(_: int) -> None:
        done.append(1)
        if len(done) == stopped_at:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit_head(*arguments, checkpoint=checkpoint, on_batch=stop)
    computed = 0

    def logits(batch: Tensor, compared: Tensor) -> tuple[Tensor, Tensor]:
        nonlocal computed
        computed += 1
        return arguments[0].logits(batch, compared)

    counting = HeadData(hidden, logits, arguments[0].weight)
    found = fit_head(counting, *arguments[1:], checkpoint=checkpoint)
    assert computed == 12 - stopped_at
    for name, tensor in whole.tensors().items():
        assert torch.equal(tensor, found.tensors()[name]), name
    # Another fit does not continue it, and a broken file says what to do.
    computed, other = 0, Checkpoint(checkpoint.path, 60.0, "another")
    found = fit_head(counting, *arguments[1:], checkpoint=other)
    assert computed == 12 and torch.equal(found.up, whole.up)
    checkpoint.path.write_bytes(b"broken")
    with pytest.raises(InputError, match="cannot be continued"):
        fit_head(*arguments, checkpoint=checkpoint)


def test_tokens_that_are_drawn_stand_for_all(rows: Tensor) -> None:
    settings = HeadSettings(RANK, epochs=1, learning_rate=0, seed=0, always=6, drawn=5)
    generator = torch.Generator().manual_seed(0)
    logits, sums, taken = draw(VOCAB, seed=7), [], torch.zeros(VOCAB)
    for _ in range(4000):
        compared = Compared.draw(VOCAB, settings, generator)
        assert compared.places[:6].tolist() == list(range(6))
        assert len(set(compared.places.tolist())) == len(compared.places) == 11
        sums.append((logits[compared.places] + compared.nats).exp().sum())
        taken[compared.places] += 1
    # Without bias: within four standard errors.
    found = torch.stack(sums)
    assert abs(found.mean() - logits.exp().sum()) < 4 * found.std() / 4000**0.5
    torch.testing.assert_close(taken[6:] / 4000, torch.full((14,), 5 / 14), atol=0.04, rtol=0)
    for every in (replace(settings, drawn=None), replace(settings, drawn=14)):
        compared = Compared.draw(VOCAB, every, generator)
        assert compared.places.tolist() == list(range(VOCAB)) and not compared.nats.any()


def test_a_head_that_compares_some_tokens_learns_all(rows: Tensor, planted: Head) -> None:
    hidden = draw(POSITIONS, HIDDEN, seed=6)
    settings = HeadSettings(
        RANK, epochs=60, learning_rate=2e-2, seed=0, batch_positions=100, always=4, drawn=4
    )
    found = fit_head(data(rows, planted, hidden), rows, moments(hidden), settings)
    fresh = draw(300, HIDDEN, seed=8)
    assert kl(found, planted, rows, fresh) < 0.05 * kl(nothing(found), planted, rows, fresh)


def test_a_feature_that_never_moves_is_harmless(rows: Tensor, planted: Head) -> None:
    hidden = draw(100, HIDDEN, seed=6)
    hidden[:, 2] = 1.0
    settings = HeadSettings(RANK, epochs=5, learning_rate=1e-2, seed=0)
    found = fit_head(data(rows, planted, hidden), rows, moments(hidden), settings)
    assert all(t.isfinite().all() for t in found.tensors().values())


def test_a_loss_that_is_not_a_number_is_an_error(rows: Tensor, planted: Head) -> None:
    hidden = draw(50, HIDDEN, seed=6)
    broken = data(rows, planted, hidden)
    hidden[7, 0] = torch.nan
    settings = HeadSettings(RANK, epochs=1, learning_rate=1e-2, seed=0)
    with pytest.raises(NumericalError, match="not a finite number"):
        fit_head(broken, rows, (torch.zeros(HIDDEN), torch.ones(HIDDEN)), settings)


def test_a_mounted_head_on_its_own_model_is_the_head(rows: Tensor, planted: Head) -> None:
    reading = Reading(planted.down, -planted.down @ planted.mean)
    mounted = MountedHead(reading, rows @ planted.up, rows @ planted.offset)
    hidden = draw(4, HIDDEN, seed=6)
    torch.testing.assert_close(mounted.shift(hidden), planted.shift(hidden) @ rows.T)
    some = torch.tensor([5, 0, 19])
    torch.testing.assert_close(mounted.shift_of(hidden, some), mounted.shift(hidden)[:, some])


def test_rows_go_to_the_longest_string_that_begins_a_token() -> None:
    strings = (b"a", b"ab", b"the", b"\xc3", b" t")
    host = Vocabulary((b"ab", b"abc", b"ax", b"th", None, b"the", b"", b" the", "é".encode()))
    string_rows = draw(len(strings), RANK + 1, seed=8)
    rows, bias = seat_rows(strings, string_rows, host)
    assert rows.shape == (len(host), RANK) and bias.shape == (len(host),)
    for token_id, text in enumerate(host.token_bytes):
        begins = [s for s in strings if text and text.startswith(s)]
        longest = strings.index(max(begins, key=len)) if begins else None
        oracle = torch.zeros(RANK + 1) if longest is None else string_rows[longest]
        assert torch.equal(torch.cat([rows[token_id], bias[token_id : token_id + 1]]), oracle)
