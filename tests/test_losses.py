"""The entropy-adaptive loss by hand; its gradient against a loop that holds weights constant."""

import math

import pytest
import torch
from torch import Tensor

from trimtab.losses import (
    Loss,
    entropy_adaptive_nats,
    masked_cross_entropy_nats,
    normalised_entropy,
)

COUNTED = torch.tensor([[True]])


def example(vocab: int = 30, *, seed: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    """Logits from nearly even to very sure, targets, and which of them count."""
    generator = torch.Generator().manual_seed(seed)
    spread = torch.tensor([0.1, 1.0, 3.0, 10.0, 60.0])[:, None]
    logits = spread * torch.randn(2, 5, vocab, generator=generator)
    targets = torch.randint(0, vocab, (2, 5), generator=generator)
    counted = torch.tensor([[True, True, False, True, True], [False, True, True, True, True]])
    return logits, targets, counted


def slow(logits: Tensor, targets: Tensor, counted: Tensor, alpha: float, detach: bool) -> Tensor:
    """The same in float64, a token at a time, from the formula."""
    total = torch.zeros((), dtype=torch.float64)
    for row, target in zip(logits.double()[counted], targets[counted], strict=True):
        probs = row.softmax(-1)
        likeliest = probs.sort(descending=True).values[:20]
        likeliest = likeliest / likeliest.sum()
        entropy = -sum((p * p.log() for p in likeliest if p > 0), torch.zeros(()).double())
        weight = (entropy / math.log(len(likeliest))) ** alpha
        total = total - (weight.detach() if detach else weight) * probs[target].log()
    return total


def gradient(loss: Tensor, logits: Tensor) -> Tensor:
    return torch.autograd.grad(loss, logits)[0]


@pytest.mark.parametrize("alpha", [0.5, 1.0, 2.0])
def test_a_small_vocabulary_by_hand(alpha: float) -> None:
    logits = torch.tensor([0.5, 0.25, 0.25]).log()[None, None]
    # H = 1/2 ln 2 + 2 * 1/4 ln 4 = 3/2 ln 2, of at most ln 3; the target costs ln 4.
    weight = 1.5 * math.log(2) / math.log(3)
    found = entropy_adaptive_nats(logits, torch.tensor([[2]]), COUNTED, alpha=alpha)
    assert found.item() == pytest.approx(weight**alpha * math.log(4), rel=1e-6)


def test_only_the_twenty_likeliest_say_how_sure_the_model_is() -> None:
    logits = torch.full((1, 1, 50), -1.0)
    logits[..., 10:30] = 0
    assert normalised_entropy(logits).item() == 1
    rest_nats = math.log(20 + 30 / math.e)
    for target, expected in ((12, rest_nats), (3, rest_nats + 1)):
        found = entropy_adaptive_nats(logits, torch.tensor([[target]]), COUNTED)
        assert found.item() == pytest.approx(expected, rel=1e-6)
    # Two even tokens and nothing else: ln 2 of at most ln 20.
    logits = torch.full((50,), -math.inf)
    logits[[7, 40]] = 5.0
    assert normalised_entropy(logits).item() == pytest.approx(math.log(2) / math.log(20), rel=1e-6)


@pytest.mark.parametrize("vocab", [2, 19, 20, 21, 3000])
def test_the_weight_goes_from_nought_when_sure_to_one_when_even(vocab: int) -> None:
    assert normalised_entropy(torch.full((4, vocab), -7.5)).tolist() == pytest.approx([1] * 4)
    sure = torch.zeros(vocab)
    sure[1] = 200
    assert normalised_entropy(sure).item() == 0
    row = example(vocab)[0][0, 1]
    sharper = normalised_entropy(torch.tensor([0.1, 1.0, 3.0, 10.0])[:, None] * row)
    assert 1 > sharper[0] > sharper[1] > sharper[2] > sharper[3] > 0


@pytest.mark.parametrize("vocab", [7, 300])
@pytest.mark.parametrize("alpha", [0.5, 1.0, 3.0])
def test_the_gradient_is_that_of_constant_weights(vocab: int, alpha: float) -> None:
    logits, targets, counted = example(vocab)
    logits.requires_grad_()
    loss = entropy_adaptive_nats(logits, targets, counted, alpha=alpha)
    expected = slow(logits, targets, counted, alpha, detach=True)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    found = gradient(loss, logits)
    torch.testing.assert_close(found, gradient(expected, logits), rtol=1e-4, atol=1e-6)
    through = gradient(slow(logits, targets, counted, alpha, detach=False), logits)
    assert (found - through).abs().max() > 1e-2
    assert not found[~counted].any()


def test_with_alpha_nought_it_is_the_cross_entropy() -> None:
    logits, targets, counted = example(300)
    logits.requires_grad_()
    plain = masked_cross_entropy_nats(logits, targets, counted)
    loss = entropy_adaptive_nats(logits, targets, counted, alpha=0)
    assert loss.item() == pytest.approx(plain.item(), rel=1e-6)
    assert torch.equal(gradient(loss, logits), gradient(plain, logits))


def test_nothing_counted_costs_nothing() -> None:
    logits, targets, counted = example()
    assert entropy_adaptive_nats(logits, targets, counted & False).item() == 0


def test_bfloat16_logits_are_widened_before_any_arithmetic() -> None:
    logits, targets, counted = example(300)
    half = logits.bfloat16()
    found = entropy_adaptive_nats(half, targets, counted)
    assert found.dtype == torch.float32
    assert torch.equal(found, entropy_adaptive_nats(half.float(), targets, counted))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_backward_pass_keeps_no_more_logits_than_the_cross_entropys(dtype: torch.dtype) -> None:
    logits, targets, counted = example(5000)
    logits = logits.to(dtype).requires_grad_()

    def kept(loss: Loss) -> int:
        sizes: list[int] = []

        def keep(tensor: Tensor) -> Tensor:
            sizes.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss(logits, targets, counted)
        return sum(size >= logits.numel() for size in sizes)

    assert kept(entropy_adaptive_nats) == kept(masked_cross_entropy_nats) > 0
