"""A field of candidates and a tail, against the same computed over the whole vocabulary."""

import pytest
import torch
from torch import Tensor

from trimtab.carriers.gate import GATE_FEATURES, gate_features
from trimtab.carriers.search import Found
from trimtab.errors import NumericalError
from trimtab.steering.field import (
    CANDIDATE_NATS,
    CANDIDATES,
    LEAST_LOGPROB,
    LOGIT_ROWS,
    TAIL_ROWS,
    Field,
    logits_in_chunks,
)
from trimtab.unembedding import Unembedding

VOCAB = 12_000
NONE = torch.zeros(0, dtype=torch.long)


@pytest.fixture
def logits() -> Tensor:
    """Three rows: sure, unsure, and nearly flat, where candidates are cut off by number."""
    noise = torch.randn(3, VOCAB, generator=torch.Generator().manual_seed(0))
    return noise * torch.tensor([[4.5], [2.0], [0.1]])


def test_candidates_are_the_likely_of_any_row_and_the_wanted(logits: Tensor) -> None:
    wanted = logits[0].argmin()[None]
    found = Field.of(logits, wanted)
    expected = {int(wanted)}
    for row in logits:
        best = row.argsort(descending=True)[: CANDIDATES // 3].tolist()
        expected |= {i for i in best if row[i] > row.max() - CANDIDATE_NATS}
    assert found.token_ids.tolist() == sorted(expected)


def test_what_is_as_likely_as_the_last_candidate_is_one(logits: Tensor) -> None:
    # In half precision many tokens have the same logit.
    rounded = logits[2:].bfloat16().float()
    last = rounded[0].sort(descending=True).values[CANDIDATES - 1]
    expected = (rounded[0] >= last).nonzero()[:, 0]
    assert len(expected) > CANDIDATES
    assert torch.equal(Field.of(rounded, NONE).token_ids, expected)


def test_logits_of_a_model_that_might_learn_are_taken_as_well(logits: Tensor) -> None:
    plain = Field.of(logits, NONE)
    found = Field.of(logits.clone().requires_grad_(), NONE)
    assert torch.equal(found.token_ids, plain.token_ids)
    assert torch.equal(found.logprobs.detach(), plain.logprobs)


def test_the_host_is_itself_everywhere(logits: Tensor) -> None:
    logits[1, 5] = -torch.inf
    field = Field.of(logits, torch.tensor([5, 7]))
    everywhere = field.everywhere(field.logprobs)
    torch.testing.assert_close(everywhere, logits.log_softmax(-1))
    targets = torch.tensor([7, int(logits[1].argmin()), int(logits[2].argmax())])
    targets[1] = next(i for i in range(VOCAB) if i not in field.token_ids)
    ours = field.of_tokens(field.logprobs.expand(2, -1, -1), targets)
    torch.testing.assert_close(ours, everywhere.gather(1, targets[:, None])[:, 0].expand(2, -1))


def test_what_shifts_a_field_shifts_the_vocabulary(logits: Tensor) -> None:
    field = Field.of(logits, NONE)
    shift = torch.linspace(-1, 1, len(field.token_ids)).expand(3, -1)
    moved = logits.index_add(1, field.token_ids, shift)
    found = field.everywhere(field.shifted(shift))
    torch.testing.assert_close(found, moved.log_softmax(-1))
    colder = field.everywhere(field.tempered(0.8)).gather(1, field.token_ids.expand(3, -1))
    expected = (logits / 0.8).log_softmax(-1)[:, field.token_ids]
    torch.testing.assert_close(colder, expected)


def test_a_gate_sees_the_tail_as_the_tokens_that_it_is(logits: Tensor) -> None:
    field = Field.of(logits, NONE)
    found = Found(
        entries=torch.zeros(3, 2, dtype=torch.long),
        weights=torch.tensor([[0.7, 0.3]] * 3),
        matched_bytes=torch.ones(3, 2, dtype=torch.long),
    )
    places = torch.tensor([[0, 1]] * 3)
    whole = gate_features(found, field.token_ids[places], logits.log_softmax(-1))
    tail = field.tail_entropy_nats
    ours = gate_features(found, places, field.logprobs, tail_entropy_nats=tail)
    torch.testing.assert_close(ours, whole)
    blind = gate_features(found, places, field.logprobs)
    entropy = GATE_FEATURES.index("entropy_nats")
    assert (blind[:, entropy] < whole[:, entropy] - 0.1).any()


def test_tails_of_more_rows_than_are_read_at_once() -> None:
    generator = torch.Generator().manual_seed(2)
    logits = 3 * torch.randn(2 * TAIL_ROWS + 3, VOCAB, generator=generator)
    logits[1, ::7], logits[-1, ::2] = -torch.inf, -torch.inf
    field = Field.of(logits, NONE)
    probs = logits.double().softmax(-1).index_fill(1, field.token_ids, 0.0)
    mass = probs.sum(-1, keepdim=True)
    entropies = -torch.special.xlogy(probs / mass, probs / mass).sum(-1)
    torch.testing.assert_close(field.logprobs[:, -1].double(), mass[:, 0].log(), rtol=0, atol=1e-5)
    tails = field.tail_entropy_nats.double()
    torch.testing.assert_close(tails, entropies, rtol=0, atol=1e-4)


def test_logits_that_are_no_numbers_are_refused() -> None:
    with pytest.raises(NumericalError, match="no numbers"):
        Field.of(torch.full((2, VOCAB), torch.nan), NONE)


def test_no_tail_and_impossible_tokens_are_no_trouble() -> None:
    logits = torch.tensor([[0.0, 1.0, -torch.inf]])
    field = Field.of(logits, torch.arange(3))
    assert field.logprobs[0, 2:].tolist() == [LEAST_LOGPROB, LEAST_LOGPROB]
    assert float(field.tail_entropy_nats[0]) == 0.0
    torch.testing.assert_close(field.everywhere(field.logprobs), logits.log_softmax(-1))


def test_logits_that_a_model_has_computed_itself_are_taken() -> None:
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(LOGIT_ROWS + 10, 4, generator=generator)
    unembedding = Unembedding(torch.randn(9, 4, generator=generator))
    own = torch.randn(len(hidden), 9, generator=generator)
    for given, expected in ((None, unembedding.logits(hidden)), (own, own)):
        chunks = list(logits_in_chunks(unembedding, hidden, given))
        assert [place for places, _ in chunks for place in places] == list(range(len(hidden)))
        torch.testing.assert_close(torch.cat([logits for _, logits in chunks]), expected)
