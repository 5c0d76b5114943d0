"""Tokens that a host does not show: their prior, and what the small models say of each."""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_generate import PROMPTS
from test_generate import adapter as adapter  # a fixture
from test_generate import host as host  # a fixture

from trimtab.backends.hf import HFModel
from trimtab.backends.live import Live
from trimtab.steering.beside import open_beside
from trimtab.steering.truncated import made_whole
from trimtab.steering.unseen import RANK_OFFSET, Unseen, rank_prior
from trimtab.store.manifest import read_manifest
from trimtab.vocab import Vocabulary


@pytest.fixture(scope="module")
def live(adapter: Path, host: HFModel) -> Live:
    return Live(open_beside(read_manifest(adapter), adapter, dtype="float32"), host)


def test_the_prior_follows_the_ids_but_for_single_characters() -> None:
    prior = rank_prior(Vocabulary((None, b"th", b"the", b"", b"e", b"\xc3\xa4")))
    assert float(prior.sum()) == pytest.approx(1.0)
    weights = [0.0, 1 / (RANK_OFFSET + 1), 1 / (RANK_OFFSET + 2), 0.0, 1 / RANK_OFFSET]
    weights.append(1 / (RANK_OFFSET + 5))
    torch.testing.assert_close(prior, torch.tensor(weights) / sum(weights))


@settings(deadline=None, derandomize=True, max_examples=40)
@given(seed=st.integers(0, 10**6), tokens=st.integers(1, 30), most=st.floats(0.01, 0.5))
def test_what_is_beyond_the_most_is_dealt_out_again(seed: int, tokens: int, most: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    stand_in = (2 * torch.randn(tokens + 1, generator=generator)).softmax(-1)[:-1]
    shown = torch.cat([torch.tensor([most]).log(), torch.full((tokens,), torch.nan)])[None]
    found = made_whole(shown, torch.cat([torch.zeros(1), stand_in])[None]).exp()[0].double()
    # The oracle finds by bisection the level at which min(level * weight, most) uses up the rest.
    weights, tail = stand_in.double(), 1 - float(stand_in.double().sum())
    low, high = 0.0, 1e9
    for _ in range(200):
        level = (low + high) / 2
        used = float((level * weights).clamp_max(most).sum()) + level * tail
        low, high = (level, high) if used < 1 - most else (low, level)
    expected = (low * weights).clamp_max(most)
    torch.testing.assert_close(found[1:-1], expected, atol=1e-5, rtol=1e-3)
    assert float(found[-1]) == pytest.approx(low * tail, abs=1e-5, rel=1e-2)


def test_tokens_that_begin_alike(live: Live) -> None:
    unseen, vocabulary = Unseen(live), live.alignment.host.vocabulary
    token_id = vocabulary.ids_by_bytes[b"t"]
    small = live.alignment.small
    oracle = [
        i
        for i, text in enumerate(vocabulary.token_bytes)
        if text and small.first_token(text) == small.first_token(b"t")
    ]
    assert unseen.begun_alike(token_id).tolist() == oracle and token_id in oracle
    nothing = vocabulary.token_bytes.index(None)
    assert unseen.begun_alike(nothing).tolist() == [nothing]


def test_likely_tokens_hold_the_experts_first_choices(live: Live, host: HFModel) -> None:
    unseen, ids = Unseen(live), host.encode(PROMPTS[0])
    reading = live.read([PROMPTS[0].encode()], host_ids=[ids])
    few, many = (set(unseen.likely(reading, range(1), n).tolist()) for n in (4, 64))
    assert few < many
    assert set(live.expected(reading, range(1), 4).tolist()) <= few


def test_a_token_may_be_told_apart_that_is_unlikely(live: Live, host: HFModel) -> None:
    """What it is worth does not hang on which others are candidates, if those like it are."""
    unseen, prompt = Unseen(live), PROMPTS[0]
    ids = host.encode(prompt)
    reading = live.read([prompt.encode()], host_ids=[ids], host_lasts=[ids[-1]])
    vocabulary = live.alignment.host.vocabulary
    every = torch.tensor([i for i, text in enumerate(vocabulary.token_bytes) if text])
    whole = live.score(reading, range(1), unseen.prior[every][None], every)
    for target in (vocabulary.ids_by_bytes[b"t"], ids[1]):
        alike = unseen.begun_alike(target)
        own = live.score(reading, range(1), unseen.prior[every][None], every, [target])
        place = int((every == target).nonzero())
        # What all tokens that begin alike get together is as it was.
        inside = torch.isin(every, alike)
        for ours, before in zip(own, whole, strict=True):
            assert float(ours.sum()) == pytest.approx(float(before.sum()), abs=1e-3)
            assert float(ours[0, inside].sum()) == pytest.approx(
                float(before[0, inside].sum()), abs=0.02
            )
            assert 0 <= float(ours[0, place]) <= float(ours[0, inside].sum()) + 1e-6
