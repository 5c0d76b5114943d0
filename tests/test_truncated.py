"""A host's likeliest tokens made a distribution, against properties and the whole vocabulary."""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_generate import PROMPTS
from test_generate import adapter as adapter  # a fixture
from test_generate import host as host  # a fixture
from torch import Tensor

from trimtab.backends.hf import HFModel
from trimtab.backends.live import Live
from trimtab.steering.beside import open_beside
from trimtab.steering.field import LEAST_LOGPROB
from trimtab.steering.predictors import Rows, Steering, predicted
from trimtab.steering.truncated import Shown, fair_evidence, made_whole, truncated
from trimtab.store.manifest import read_manifest


def random_shown(seed: int, tokens: int, top: int) -> tuple[Tensor, Tensor, Tensor]:
    """A host's distribution, the same cut to its likeliest, and a stand-in."""
    generator = torch.Generator().manual_seed(seed)
    host = (3 * torch.randn(2, tokens, generator=generator)).log_softmax(-1)
    stand_in = (3 * torch.randn(2, tokens + 1, generator=generator)).softmax(-1)[:, :-1]
    least = host.topk(top).values[:, -1:]
    return host, host.masked_fill(host < least, torch.nan), stand_in


@settings(deadline=None, derandomize=True, max_examples=60)
@given(seed=st.integers(0, 10**6), tokens=st.integers(2, 40), share=st.floats(0.05, 1.0))
def test_what_was_shown_stays_and_the_rest_is_dealt_out(
    seed: int, tokens: int, share: float
) -> None:
    top = max(1, int(share * tokens))
    host, shown, stand_in = random_shown(seed, tokens, top)
    found = made_whole(shown, stand_in)
    is_shown = ~shown.isnan()
    torch.testing.assert_close(found.exp().sum(-1), torch.ones(2), atol=1e-5, rtol=0)
    torch.testing.assert_close(found[:, :-1][is_shown], host[is_shown], atol=1e-4, rtol=1e-4)
    least = torch.where(is_shown, host, torch.inf).amin(-1, keepdim=True)
    assert (torch.where(is_shown, -torch.inf, found[:, :-1]) <= least + 1e-4).all()


def test_the_rest_is_in_the_stand_ins_proportions() -> None:
    shown = torch.tensor([[0.7, torch.nan, torch.nan]]).log()
    found = made_whole(shown, torch.tensor([[0.5, 0.3, 0.1]])).exp()[0]
    torch.testing.assert_close(found, torch.tensor([0.7, 0.18, 0.06, 0.06]))
    # Nothing that was not shown is likelier than what was.
    capped = made_whole(torch.tensor([[0.2, torch.nan]]).log(), torch.tensor([[0.1, 0.9]])).exp()[0]
    torch.testing.assert_close(capped, torch.tensor([0.2, 0.2, 0.6]))


def test_rounded_logprobs_and_nothing_shown() -> None:
    over = made_whole(torch.tensor([[0.8, 0.3]]).log(), torch.tensor([[0.5, 0.5]]))
    assert float(over[0, -1]) == LEAST_LOGPROB
    torch.testing.assert_close(over.exp().sum(), torch.tensor(1.0))
    nothing = made_whole(torch.full((1, 2), torch.nan), torch.tensor([[0.5, 0.25]])).exp()[0]
    torch.testing.assert_close(nothing, torch.tensor([0.5, 0.25, 0.25]))


def test_a_blend_is_not_blamed_for_what_was_not_shown() -> None:
    scores = torch.tensor([[-9.0, -2.0, -9.0], [-12.0, -5.0, -3.0], [-4.5, -1.0, -8.0]])
    host, was_shown = torch.tensor([-4.0, -2.0, -6.0]), torch.tensor([False, True, False])
    found = fair_evidence(scores, host, was_shown)
    assert found.tolist() == [[-4.0, -2.0, -6.0], [-5.0, -5.0, -3.0], [-4.5, -1.0, -7.0]]


def test_rows_are_gathered_over_the_candidates_of_all() -> None:
    shown = Shown.of([{5: -0.1, 2: -3.0}, {9: -0.5}], torch.tensor([7, 2]))
    assert shown.token_ids.tolist() == [2, 5, 7, 9]
    oracle = torch.tensor([[-3.0, -0.1, torch.nan, torch.nan], [*[torch.nan] * 3, -0.5]])
    torch.testing.assert_close(shown.logprobs, oracle, equal_nan=True)


@pytest.fixture
def live(adapter: Path, host: HFModel) -> Live:
    return Live(open_beside(read_manifest(adapter), adapter, dtype="float32"), host)


def test_all_tokens_shown_give_the_predictors_of_full_logits(live: Live, host: HFModel) -> None:
    steering = Steering(("live",), live=live)
    contexts = [prompt.encode() for prompt in PROMPTS[:2]]
    ids = [host.encode(prompt) for prompt in PROMPTS[:2]]
    logits = torch.stack([host.logits(torch.tensor([i]))[0, -1] for i in ids]).float()
    reading = live.read(contexts, host_ids=ids)
    rows = Rows(logits, torch.zeros(2, 1), contexts, ((reading, range(2)),))
    found = predicted(steering, rows)
    field, oracle = found.field, found.logprobs
    whole = [dict(enumerate(row.tolist())) for row in logits.log_softmax(-1)]
    shown = Shown.of(whole, torch.zeros(0, dtype=torch.long))
    found = truncated(steering, live, reading, range(2), shown)
    assert list(found) == list(steering.families["live"])
    for name, logprobs in found.items():
        expected = field.everywhere(oracle[name])
        torch.testing.assert_close(logprobs[:, :-1].exp(), expected.exp(), atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("top", [5, 20, 100])
def test_a_few_tokens_give_distributions(live: Live, host: HFModel, top: int) -> None:
    steering = Steering(("live",), live=live)
    ids = host.encode(PROMPTS[0])
    logprobs = host.logits(torch.tensor([ids]))[0, -1].float().log_softmax(-1)
    reading = live.read([PROMPTS[0].encode()], host_ids=[ids])
    best = logprobs.topk(top)
    row = dict(zip(best.indices.tolist(), best.values.tolist(), strict=True))
    shown = Shown.of([row], live.expected(reading, range(1), 64))
    found = truncated(steering, live, reading, range(1), shown)
    for logprobs in found.values():
        assert float(logprobs.exp().sum()) == pytest.approx(1.0, abs=1e-4)
        assert bool(logprobs.isfinite().all())
