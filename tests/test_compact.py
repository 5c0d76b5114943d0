"""The compact encoding of states against slow references, bounds and the exact recording."""

import json
import shutil
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from test_generate import domain_text
from torch import Tensor

from trimtab import compact
from trimtab.backends.pair import open_pair
from trimtab.cli import main
from trimtab.compact import (
    SPACING,
    Precision,
    StateCode,
    code_for,
    difference_basis,
)
from trimtab.config import FitConfig, RecordConfig, TuneConfig
from trimtab.errors import RecordingError
from trimtab.fit import fit
from trimtab.fitting.recorded import with_states
from trimtab.foretelling import foretelling_for
from trimtab.record import record
from trimtab.rice import PART, decode_rows, encode_rows
from trimtab.store.recording import Recording, read_code, write_code
from trimtab.store.recording_schema import CODE_NAME, MANIFEST_NAME
from trimtab.stored_states import pack_states, unpack_states
from trimtab.tune import tune
from trimtab.types import silent
from trimtab.unembedding import Unembedding

HIDDEN, VOCAB = 24, 300
PARAMETERS = (0, 1, 2, 3, 5, 8, 12)


def slow_decode(packed: bytes, columns: int) -> list[int]:
    """One row, bit by bit, as the format is described."""
    bits = iter([(byte >> bit) & 1 for byte in packed for bit in range(8)])

    def number(width: int) -> int:
        return sum(next(bits) << place for place in range(width))

    found: list[int] = []
    while len(found) < columns:
        header = number(3)
        for _ in range(PART):
            if header == 0:
                found.append(0)
                continue
            ones = 0
            while next(bits):
                ones += 1
            k = PARAMETERS[header - 1]
            unsigned = (ones << k) | number(k)
            found.append(-(unsigned + 1) // 2 if unsigned & 1 else unsigned // 2)
    return found[:columns]


@st.composite
def tables(draw: st.DrawFn) -> np.ndarray:
    rows, columns = draw(st.integers(0, 5)), draw(st.integers(1, 40))
    number = st.one_of(st.just(0), st.integers(-3, 3), st.integers(-20_000, 20_000))
    values = draw(st.lists(number, min_size=rows * columns, max_size=rows * columns))
    return np.array(values, dtype=np.int64).reshape(rows, columns)


@given(tables())
@settings(deadline=None)
def test_numbers_come_back_as_the_format_is_described(values: np.ndarray) -> None:
    packed, sizes = encode_rows(values)
    assert np.array_equal(decode_rows(packed, sizes, values.shape[1]), values)
    starts = np.concatenate([[0], sizes.cumsum()])
    for row, (start, stop) in enumerate(pairwise(starts)):
        assert slow_decode(packed[start:stop].tobytes(), values.shape[1]) == values[row].tolist()


def test_small_numbers_are_short() -> None:
    zeros, sizes = encode_rows(np.zeros((3, 160), np.int64))
    assert sizes.tolist() == [2, 2, 2] and not zeros.any()
    drawn = np.random.default_rng(0).geometric(0.5, (200, 160)) - 1
    # The entropy of such a number is 2 bits; its Rice code has as many, and a row its headers.
    _, sizes = encode_rows(np.where(drawn % 2, -(drawn + 1) // 2, drawn // 2))
    assert 8 * sizes.mean() < 160 * 2.05 + 5 * 3 + 8


@pytest.mark.parametrize("change", ["cut", "longer", "other"])
def test_bytes_that_are_no_rows_are_refused(change: str) -> None:
    packed, sizes = encode_rows(np.random.default_rng(1).integers(-9, 9, (4, 50)))
    if change == "cut":
        packed = packed[:-1]
    elif change == "longer":
        sizes = sizes + 3
        packed = np.concatenate([packed, np.zeros(12, np.uint8)])
    else:
        packed = np.full_like(packed, 255)
    with pytest.raises(ValueError, match="rows"):
        decode_rows(packed, sizes, 50)


def drawn(rows: int, seed: int = 0) -> tuple[Unembedding, Tensor, Tensor]:
    """A head, and states of a reference and an expert that differ in some directions most."""
    dice = torch.Generator().manual_seed(seed)
    head = Unembedding(torch.randn(VOCAB, HIDDEN, generator=dice))
    reference = 1.2 * torch.randn(rows, HIDDEN, generator=dice)
    sizes = torch.logspace(0, -2, HIDDEN)
    return head, reference, reference + 0.4 * torch.randn(rows, HIDDEN, generator=dice) * sizes


def code_of(head: Unembedding, reference: Tensor, expert: Tensor, step: float) -> StateCode:
    known = reference[:500]
    foretelling, left = foretelling_for(known, expert[:500] - known)
    basis = difference_basis(foretelling.states(known), left, head)
    return StateCode(
        basis, foretelling, head, Precision(step, likely_tokens=100, flattening=0.7, row_nats=1e9)
    )


def kl(head: Unembedding, one: Tensor, other: Tensor) -> float:
    ours, theirs = (head.logits(states).double().log_softmax(-1) for states in (one, other))
    return float((ours.exp() * (ours - theirs)).sum(-1).mean())


def test_finer_steps_take_more_bytes_and_lose_less() -> None:
    head, reference, expert = drawn(700)
    between, found = kl(head, expert, reference), []
    for step in (0.3, 0.1, 0.03, 0.008):
        code = code_of(head, reference, expert, step)
        stored = code.encode(reference, expert)
        columns = pack_states(stored, 9)
        size = sum(column.numel() * column.element_size() for column in columns.values())
        lost = kl(head, expert, code.decode(reference, stored)) / between
        found.append((size / len(expert), lost))
    assert [size for size, _ in found] == sorted(size for size, _ in found)
    assert [lost for _, lost in found] == sorted((lost for _, lost in found), reverse=True)
    # Half of what the states would take in float16, for a thousandth of the difference.
    assert found[-1][0] < HIDDEN and found[-1][1] < 0.001 < found[0][1] < 1


def test_what_the_reference_foretells_takes_no_bytes() -> None:
    head, reference, expert = drawn(700)
    dice = torch.Generator().manual_seed(8)
    mixing = 0.3 * torch.randn(HIDDEN, 3, generator=dice) @ torch.randn(3, HIDDEN, generator=dice)
    moved = expert + (reference - 1) @ mixing
    sizes = {}
    for name, theirs in (("moved", moved), ("plain", expert)):
        code = code_of(head, reference, theirs, 0.1)
        columns = pack_states(code.encode(reference, theirs), 9)
        sizes[name] = columns["codes"].numel() / len(reference)
        unforetold = replace(
            code, foretelling=replace(code.foretelling, up=0 * code.foretelling.up)
        )
        columns = pack_states(unforetold.encode(reference, theirs), 9)
        sizes[f"{name}, unforetold"] = columns["codes"].numel() / len(reference)
    assert sizes["moved"] < 1.15 * sizes["plain"]
    assert sizes["moved, unforetold"] > 1.3 * sizes["moved"]


def test_what_is_packed_comes_back() -> None:
    head, reference, expert = drawn(70)
    # A token that only the expert expects.
    expert[3] = 3 * head.weight[7]
    code = code_of(head, reference, expert, 0.02)
    stored = code.encode(reference, expert)
    assert stored.unexpected.token_ids[3, 0] == 7 and (stored.unexpected.token_ids >= 0).sum() > 1
    found = unpack_states(pack_states(stored, 9), HIDDEN, 9)
    assert torch.equal(found.numbers, stored.numbers)
    assert torch.equal(found.unexpected.token_ids, stored.unexpected.token_ids)
    assert torch.equal(found.unexpected.levels, stored.unexpected.levels)
    some = slice(20, 45)
    states = code.decode(reference[some], found.rows(some))
    torch.testing.assert_close(states, code.decode(reference, stored)[some])


def test_a_token_that_only_the_expert_expects_is_told() -> None:
    head, reference, expert = drawn(40, seed=2)
    expert[:] = reference + 0.02 * torch.randn(reference.shape)
    likely = head.logits(reference).argmin(-1)
    expert[:8] += 6 * head.weight[likely[:8]] / head.weight[likely[:8]].norm(dim=1, keepdim=True)
    code = code_of(head, reference, expert, 0.02)
    stored = code.encode(reference, expert)
    lost = kl(head, expert[:8], code.decode(reference, stored)[:8])
    assert lost < 0.01 * kl(head, expert[:8], reference[:8])


def test_no_position_loses_more_than_it_may() -> None:
    head, reference, expert = drawn(120, seed=6)
    # Far from what was foretold, and not in one token.
    expert[::10] += 3 * torch.randn(12, HIDDEN, generator=torch.Generator().manual_seed(7))
    coarse = code_of(head, reference[1::2], expert[1::2], 0.3)
    plain = compact._row_nats(
        head, expert, coarse.decode(reference, coarse.encode(reference, expert))
    )
    limit = 2 * float(plain.median())
    bounded = replace(coarse, precision=replace(coarse.precision, row_nats=limit))
    stored = bounded.encode(reference, expert)
    lost = compact._row_nats(head, expert, bounded.decode(reference, stored))
    assert (plain > limit).any() and (lost <= limit * 1.001).all()
    assert torch.equal(stored.halvings > 0, plain > limit)
    torch.testing.assert_close(lost[plain <= limit], plain[plain <= limit])
    found = unpack_states(pack_states(stored, 9), HIDDEN, 9)
    assert torch.equal(found.halvings, stored.halvings)


def test_rounding_stays_within_half_a_step_of_each_plane() -> None:
    """Babai's bound: |(R e)_i| <= SPACING / 2, in the coordinates that are told."""
    dice = torch.Generator().manual_seed(3)
    mixing = torch.randn(5, HIDDEN, HIDDEN, generator=dice)
    metric = 3 * mixing.transpose(1, 2) @ mixing + torch.eye(HIDDEN)
    factor = torch.linalg.cholesky(metric, upper=True)
    wanted = torch.randn(5, HIDDEN, generator=dice)
    numbers = compact._rounded(wanted, factor).float()
    size = factor.diagonal(dim1=1, dim2=2)
    assert (size > compact.FEWEST_R).all()
    left = (factor @ (wanted - numbers * SPACING / size)[:, :, None])[:, :, 0]
    assert left.abs().max() <= SPACING / 2 + 1e-4
    # Each coordinate by itself would be further away in this metric.
    plain = (wanted * size / SPACING).round() * SPACING / size
    assert left.norm() < (factor @ (wanted - plain)[:, :, None]).norm()


def test_the_metric_is_the_covariance_of_what_the_next_token_depends_on() -> None:
    head, reference, expert = drawn(6)
    code = code_of(head, reference, expert, 0.1)
    weights = code._weights(code._probs(code.foretelling.states(reference)))
    halvings = torch.tensor([0, 1, 0, 3, 0, 0])
    factor = code._factor(weights, halvings, head.weight @ code.basis)
    for row in range(6):
        shares, rows = weights[row] / weights[row].sum(), head.weight @ code.basis
        middle = sum(share * token for share, token in zip(shares, rows, strict=True))
        metric, step = torch.eye(HIDDEN), 0.1 / 2 ** int(halvings[row])
        for share, token in zip(shares, rows, strict=True):
            metric += share * torch.outer(token - middle, token - middle) / step**2
        torch.testing.assert_close(factor[row].T @ factor[row], metric, rtol=1e-3, atol=1e-3)
        assert (weights[row] > 0).sum() == 100


def test_a_reader_with_other_rounding_reads_nearly_the_same() -> None:
    head, reference, expert = drawn(200)
    code = code_of(head, reference, expert, 0.02)
    stored = code.encode(reference, expert)
    noise = 1 + 1e-3 * torch.randn(head.weight.shape, generator=torch.Generator().manual_seed(4))
    other = replace(code, head=Unembedding(head.weight * noise))
    same, found = code.decode(reference, stored), other.decode(reference, stored)
    assert not torch.equal(same, found)
    assert kl(head, same, found) < 1e-3 * kl(head, expert, reference)


def test_equal_models_take_next_to_nothing() -> None:
    head, reference, _ = drawn(50)
    code = code_of(head, reference, reference, 0.02)
    stored = code.encode(reference, reference.clone())
    assert not stored.numbers.any()
    torch.testing.assert_close(code.decode(reference, stored), reference)


def test_broken_columns_are_refused() -> None:
    head, reference, expert = drawn(40)
    code = code_of(head, reference, expert, 0.02)
    columns = pack_states(code.encode(reference, expert), 9)
    for name, value in (("unexpected_sizes", 99), ("code_sizes", 3), ("halvings", 9)):
        broken = columns | {name: torch.full_like(columns[name], value)}
        with pytest.raises(ValueError, match=r"can.* be|rows"):
            unpack_states(broken, HIDDEN, 9)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An expert that learnt much, recorded exactly and in few bytes."""
    folder = tmp_path_factory.mktemp("compact")
    for number in range(4):
        (folder / f"{number}.txt").write_text(domain_text(number))
    (folder / "plain.md").write_text("Plain prose, about nothing in particular. " * 8)
    tuning = {"model": "tiny:llama?hidden=64&vocab=bpe", "data": (str(folder / "*.txt"),)}
    tuning |= {"learning_rate": 5e-2, "window_tokens": 128, "held_out": 0.25, "dtype": "float32"}
    tune(TuneConfig.model_validate({**tuning, "validations": 1, "out": folder / "expert"}))
    for encoding in ("exact", "compact"):
        record(config_of(folder, encoding))
    return folder


def config_of(folder: Path, encoding: str) -> RecordConfig:
    config = {"expert": folder / "expert", "out": folder / encoding, "encoding": encoding}
    config |= {"general": (str(folder / "*.md"),), "dtype": "float32", "shard_tokens": 256}
    return RecordConfig.model_validate(config)


def test_a_recording_keeps_what_the_exact_one_says(folder: Path) -> None:
    head = open_pair(folder / "expert", dtype="float32").reference_unembedding
    exact, ours = (Recording.open(folder / name) for name in ("exact", "compact"))
    one, two = exact.read("train"), ours.read("train")
    assert torch.equal(one["reference_hidden"], two["reference_hidden"])
    found = with_states(ours, two, head, silent)
    assert set(found) == set(one) and found["expert_hidden"].dtype == one["expert_hidden"].dtype
    states = {
        name: columns["expert_hidden"].float()
        for name, columns in (("exact", one), ("compact", found))
    }
    with torch.no_grad():
        between = kl(head, states["exact"], one["reference_hidden"].float())
        assert between > 0.02
        lost = kl(head, states["exact"], states["compact"])
    assert lost < 0.01 * between
    encoding = ours.manifest.encoding
    assert encoding.kind == "compact"
    assert vars(ours.state_code(head).precision) == {
        "step": encoding.step,
        "likely_tokens": encoding.likely_tokens,
        "flattening": encoding.flattening,
        "row_nats": encoding.row_nats,
    }
    assert ours.manifest.files[CODE_NAME].bytes > 64 * 64
    with pytest.raises(RecordingError, match="has encoding 'exact', not 'compact'"):
        exact.state_code(head)


def test_an_adapter_made_of_it_is_nearly_the_same(folder: Path) -> None:
    keys = {}
    for encoding in ("exact", "compact"):
        options = {"recording": folder / encoding, "out": folder / f"{encoding}.adapter"}
        options |= {"rank": 8, "epochs": 3, "active_tokens": 256, "key_size": 16}
        made = fit(FitConfig.model_validate(options)).folder
        keys[encoding] = load_file(made / "head.safetensors")
    for name, ours in keys["exact"].items():
        theirs = keys["compact"][name]
        assert ours.shape == theirs.shape
        if ours.is_floating_point():
            assert (ours.float() - theirs.float()).norm() < 0.2 * ours.float().norm() + 1e-3, name


def test_a_code_is_stored_in_bytes_and_read_as_it_is_used(tmp_path: Path) -> None:
    head, reference, expert = drawn(300)
    code = code_for(reference, expert, head)
    write_code(tmp_path / "code.safetensors", code)
    used = read_code(tmp_path / "code.safetensors", head)
    assert used.precision == code.precision
    assert ((used.basis - code.basis).abs() <= code.basis.abs().amax(0) / 254 + 1e-6).all()
    between = kl(head, expert, reference)
    shares = [code.precision.step / between**0.5 / share for share in compact.STEP_SHARES]
    assert any(share == pytest.approx(1, rel=0.1) for share in shares)
    assert kl(head, expert, used.decode(reference, used.encode(reference, expert))) < 0.01 * between
    (tmp_path / "code.safetensors").write_bytes(b"nothing")
    with pytest.raises(RecordingError, match="cannot read the shard"):
        read_code(tmp_path / "code.safetensors", head)


def test_a_code_is_made_of_one_state() -> None:
    head, reference, expert = drawn(1)
    code = code_for(reference, expert, head)
    found = code.decode(reference, code.encode(reference, expert))
    assert kl(head, expert, found) < 0.05 * kl(head, expert, reference)


def test_compact_recordings_of_before_are_refused(folder: Path, tmp_path: Path) -> None:
    old = tmp_path / "old"
    shutil.copytree(folder / "compact", old)
    content = json.loads((old / MANIFEST_NAME).read_text())
    del content["encoding"]["row_nats"]
    (old / MANIFEST_NAME).write_text(json.dumps(content))
    with pytest.raises(RecordingError, match=r"row_nats: it is missing, as in .* older trimtab"):
        Recording.open(old)


def test_an_expert_with_a_head_of_its_own_is_refused(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tuning = {"model": "tiny:llama?hidden=32", "data": (str(folder / "*.txt"),), "method": "full"}
    tuning |= {"window_tokens": 128, "validations": 1, "out": folder / "full", "dtype": "float32"}
    tune(TuneConfig.model_validate(tuning))
    words = ["record", str(folder / "full"), "--out", str(folder / "r"), "--encoding", "compact"]
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code
    assert "has a head of its own" in capsys.readouterr().err
