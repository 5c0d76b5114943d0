"""Speculative sampling's two formulas, against the distribution that they must keep."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from trimtab.acceptance import acceptance, residual

masses = st.lists(st.integers(0, 5), min_size=4, max_size=4).filter(any)


def normalised(mass: list[int]) -> Tensor:
    return torch.tensor(mass, dtype=torch.float64) / sum(mass)


def outcome(probs: Tensor, proposal: Tensor, told: Tensor | None) -> Tensor:
    """Distribution of the token that is written, summed over all drafts drawn from `proposal`."""
    written = torch.zeros_like(probs)
    for drafted, drawn in enumerate(proposal.tolist()):
        if drawn:
            accepted = acceptance(probs, drafted, told)
            written[drafted] += drawn * accepted
            if accepted < 1:
                written += drawn * (1 - accepted) * residual(probs, drafted, told)
    return written


@settings(deadline=None)
@given(masses, masses)
def test_what_is_written_has_the_targets_distribution(target: list[int], drawn: list[int]) -> None:
    probs, proposal = normalised(target), normalised(drawn)
    torch.testing.assert_close(outcome(probs, proposal, proposal), probs)
    # Drawn from whatever it may be, but verified as if it had been certain.
    torch.testing.assert_close(outcome(probs, proposal, None), probs)


@settings(deadline=None)
@given(masses, masses)
def test_as_many_drafts_stand_as_the_distributions_share(
    target: list[int], drawn: list[int]
) -> None:
    probs, proposal = normalised(target), normalised(drawn)
    stand = sum(
        q * acceptance(probs, token_id, proposal)
        for token_id, q in enumerate(proposal.tolist())
        if q
    )
    assert stand == pytest.approx(float(torch.minimum(probs, proposal).sum()))


def test_rounding_leaves_the_target_itself() -> None:
    probs = torch.tensor([0.5, 0.5])
    assert torch.equal(residual(probs, 0, probs.clone()), probs)
    assert torch.equal(residual(torch.tensor([1.0, 0.0]), 0, None), torch.tensor([1.0, 0.0]))


def test_a_draft_that_cannot_have_been_drawn_is_refused() -> None:
    with pytest.raises(ValueError, match="token 1 cannot have been drawn"):
        acceptance(torch.tensor([0.5, 0.5]), 1, torch.tensor([1.0, 0.0]))
