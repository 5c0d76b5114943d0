"""Combining distributions, against probabilities multiplied and added directly."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from trimtab.blend import PROXY, BlendWeights, evidence_weights, log_linear, mix, mixture_logprobs

steady = settings(deadline=None, derandomize=True, max_examples=50)

exponents = st.floats(0, 2)


def distributions(*shape: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (4 * torch.randn(*shape, generator=generator, dtype=torch.float64)).log_softmax(-1)


@steady
@given(a=exponents, b=exponents, c=exponents, seed=st.integers(0, 1000))
def test_a_product_of_powers_normalised(a: float, b: float, c: float, seed: int) -> None:
    host, expert, reference = distributions(3, 2, 7, seed=seed)
    found = log_linear(host, expert, reference, BlendWeights(a, b, c))
    product = host.exp() ** a * expert.exp() ** b / reference.exp() ** c
    torch.testing.assert_close(found.exp(), product / product.sum(-1, keepdim=True))
    torch.testing.assert_close(found.exp().sum(-1), torch.ones(2).double())


@steady
@given(a=exponents, b=exponents, seed=st.integers(0, 1000))
def test_equal_distributions_are_a_fixed_point(a: float, b: float, seed: int) -> None:
    same = distributions(4, seed=seed)
    weights = BlendWeights(a, b, a + b - 1)
    torch.testing.assert_close(log_linear(same, same, same, weights), same)


def test_proxy_tuning_adds_the_shift_of_the_small_model() -> None:
    host, expert, reference = distributions(3, 5, seed=1)
    found = log_linear(host, expert, reference, PROXY)
    torch.testing.assert_close(found, (host + expert - reference).log_softmax(-1))
    torch.testing.assert_close(log_linear(host, expert, expert, PROXY), host)


def test_forbidden_tokens_are_no_trouble_to_a_model_without_a_say() -> None:
    forbidding = torch.tensor([0.5, 0.5, 0.0]).log()
    other = torch.tensor([0.2, 0.3, 0.5]).log()
    alone = BlendWeights(1, 0, 0)
    torch.testing.assert_close(log_linear(forbidding, other, other, alone), forbidding)
    torch.testing.assert_close(log_linear(other, forbidding, forbidding, alone), other)
    expert_alone = BlendWeights(0, 1, 0)
    torch.testing.assert_close(log_linear(forbidding, other, other, expert_alone), other)


@steady
@given(gate=st.floats(1e-6, 0.999), seed=st.integers(0, 1000))
def test_a_mixture_is_the_sum_of_probabilities(gate: float, seed: int) -> None:
    ours, theirs = distributions(2, 3, 6, seed=seed)
    found = mix(ours, theirs, torch.full((3, 1), gate, dtype=torch.float64))
    torch.testing.assert_close(found.exp(), (1 - gate) * ours.exp() + gate * theirs.exp())
    torch.testing.assert_close(found.exp().sum(-1), torch.ones(3).double())


def test_mixing_with_nothing() -> None:
    ours = distributions(4, seed=3)
    assert torch.equal(mix(ours, distributions(4, seed=4), torch.zeros(1).double()), ours)
    silent = torch.full((4,), -torch.inf, dtype=torch.float64)
    found = mix(ours, silent, torch.tensor([0.25]).double())
    torch.testing.assert_close(found, ours + math.log(0.75))
    both = mix(silent, silent, torch.tensor([0.5]).double())
    assert both.isneginf().all()


texts = st.lists(st.lists(st.floats(-20, 0), min_size=3, max_size=3), min_size=0, max_size=40).map(
    lambda rows: torch.tensor(rows, dtype=torch.float64).reshape(-1, 3).T
)
priors = st.lists(st.floats(0.01, 1), min_size=3, max_size=3).map(
    lambda p: torch.tensor(p, dtype=torch.float64) / sum(p)
)


@steady
@given(logprobs=texts, prior=priors)
def test_evidence_costs_at_most_the_priors_logarithm(logprobs: Tensor, prior: Tensor) -> None:
    weights = evidence_weights(logprobs, prior)
    paid = -mixture_logprobs(logprobs, weights[:, :-1]).sum()
    for k in range(3):
        assert paid <= -logprobs[k].sum() - prior[k].log() + 1e-6


@steady
@given(logprobs=texts, prior=priors, share=st.sampled_from([0.0, 0.01, 0.3]))
def test_weights_use_only_the_past(logprobs: Tensor, prior: Tensor, share: float) -> None:
    weights = evidence_weights(logprobs, prior, share=share)
    assert weights.shape == (3, logprobs.shape[1] + 1)
    torch.testing.assert_close(weights[:, 0], prior)
    torch.testing.assert_close(weights.sum(0), torch.ones(weights.shape[1]).double())
    assert (weights >= share * prior[:, None] - 1e-12).all()
    begun = evidence_weights(logprobs[:, : logprobs.shape[1] // 2], prior, share=share)
    torch.testing.assert_close(weights[:, : begun.shape[1]], begun)


@steady
@given(logprobs=texts, prior=priors, share=st.sampled_from([0.0, 0.01, 0.3]))
def test_weights_follow_bayes(logprobs: Tensor, prior: Tensor, share: float) -> None:
    weight = prior.numpy()
    found = evidence_weights(logprobs, prior, share=share)
    for step, column in zip(logprobs.numpy().T, found.numpy().T[1:], strict=True):
        weight = weight * np.exp(step - step.max())
        weight = (1 - share) * weight / weight.sum() + share * prior.numpy()
        np.testing.assert_allclose(column, weight, rtol=1e-6, atol=1e-12)


def test_a_text_may_turn() -> None:
    first, then = torch.tensor([[-0.1], [-3.0]]), torch.tensor([[-3.0], [-0.1]])
    logprobs = torch.cat([first.expand(2, 50), then.expand(2, 10)], 1)
    half = torch.tensor([0.5, 0.5])
    stubborn = evidence_weights(logprobs, half)
    nimble = evidence_weights(logprobs, half, share=0.01)
    assert stubborn[1, -1] < 1e-9
    assert nimble[1, -1] > 0.95


def test_mixture_logprobs_against_probabilities() -> None:
    logprobs = distributions(3, 4, 5, seed=7)
    weights = torch.tensor([0.7, 0.3, 0.0]).double()[:, None, None].expand(3, 4, 5)
    found = mixture_logprobs(logprobs, weights)
    torch.testing.assert_close(found.exp(), (weights * logprobs.exp()).sum(0))
    single = mixture_logprobs(logprobs.float(), weights)
    assert single.dtype == torch.float32
    assert found.exp().sum(-1).tolist() == pytest.approx([1.0] * 4)


def test_evidence_goes_on_where_a_part_ended() -> None:
    logprobs = torch.randn(3, 9, generator=torch.Generator().manual_seed(4)).abs().neg()
    prior = torch.tensor([0.5, 0.25, 0.25])
    whole = evidence_weights(logprobs, prior, share=0.01)
    first = evidence_weights(logprobs[:, :4], prior, share=0.01)
    second = evidence_weights(logprobs[:, 4:], prior, share=0.01, start=first[:, -1])
    torch.testing.assert_close(torch.cat([first[:, :-1], second], 1), whole)
