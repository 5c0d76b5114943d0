"""Encodings of next-token distributions against slow references and properties."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trimtab.encoding import (
    TopK,
    bits_needed,
    decode_samples,
    decode_topk,
    encode_samples,
    encode_topk,
    pack_bits,
    pack_samples,
    pack_topk,
    unpack_bits,
    unpack_samples,
    unpack_topk,
)


def peaked_logits(rows: int, vocab: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 4 * torch.randn(rows, vocab, generator=generator)


def uniforms(rows: int, draws: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(rows, draws, generator=generator, dtype=torch.float64)


@st.composite
def packable(draw: st.DrawFn) -> tuple[torch.Tensor, int]:
    bits = draw(st.integers(1, 31))
    rows, columns = draw(st.integers(0, 4)), draw(st.integers(0, 9))
    number = st.integers(0, 2**bits - 1)
    values = draw(st.lists(number, min_size=rows * columns, max_size=rows * columns))
    return torch.tensor(values, dtype=torch.int64).reshape(rows, columns), bits


@given(packable())
@settings(deadline=None)
def test_packed_numbers_come_back(case: tuple[torch.Tensor, int]) -> None:
    values, bits = case
    packed = pack_bits(values, bits)
    assert packed.shape == (len(values), math.ceil(values.shape[1] * bits / 8))
    assert torch.equal(unpack_bits(packed, bits, values.shape[1]).long(), values)


def test_packing_equals_arithmetic() -> None:
    values = torch.tensor([[5, 1, 1023]])
    number = 5 + (1 << 10) + (1023 << 20)
    assert bytes(pack_bits(values, 10)[0].tolist()) == number.to_bytes(4, "little")


@pytest.mark.parametrize("values", [[[4]], [[-1]]])
def test_a_number_too_large_is_refused(values: list[list[int]]) -> None:
    with pytest.raises(ValueError, match="do not fit in 2 bits"):
        pack_bits(torch.tensor(values), 2)


@pytest.mark.parametrize(("values", "bits"), [(1, 1), (2, 1), (3, 2), (49152, 16), (151936, 18)])
def test_bits_needed(values: int, bits: int) -> None:
    assert bits_needed(values) == bits


@pytest.mark.parametrize("top_k", [1, 7, 300, 999])
def test_topk_with_tail_sums_to_one(top_k: int) -> None:
    logits = peaked_logits(5, 300)
    topk = unpack_topk(pack_topk(encode_topk(logits, top_k), 300), 300)
    probs = decode_topk(topk, 300).exp()
    assert torch.allclose(probs.sum(-1), torch.ones(5), atol=1e-5)
    kept = topk.logprobs.exp().sum(-1) + topk.log_tail.exp()
    assert torch.allclose(kept, torch.ones(5), atol=1e-5)


def test_a_tail_is_dealt_out_in_a_stand_ins_proportions() -> None:
    generator = torch.Generator().manual_seed(3)
    expert = 3 * torch.randn(6, 300, generator=generator)
    reference = expert + 0.5 * torch.randn(6, 300, generator=generator)
    topk = encode_topk(expert, 20)
    told = decode_topk(topk, 300, reference)
    torch.testing.assert_close(told.exp().sum(-1), torch.ones(6))
    torch.testing.assert_close(told.gather(1, topk.token_ids.long()), topk.logprobs)
    others = [i for i in range(300) if i not in topk.token_ids[2].tolist()]
    torch.testing.assert_close(
        told[2, others] - told[2, others[0]], reference[2, others] - reference[2, others[0]]
    )
    torch.testing.assert_close(decode_topk(topk, 300, torch.zeros(6, 300)), decode_topk(topk, 300))
    exact = expert.log_softmax(-1)
    lost = [(exact.exp() * (exact - way)).sum() for way in (told, decode_topk(topk, 300))]
    assert lost[0] < lost[1] / 2
    whole = encode_topk(expert, 300)
    torch.testing.assert_close(decode_topk(whole, 300, reference), exact)


def test_topk_equals_sorting() -> None:
    logits = peaked_logits(4, 50)
    topk = encode_topk(logits, 6)
    for row in range(4):
        logprobs = logits[row].double().log_softmax(-1)
        order = sorted(range(50), key=lambda token: -logprobs[token].item())
        assert topk.token_ids[row].tolist() == order[:6]
        assert torch.allclose(topk.logprobs[row].double(), logprobs[order[:6]], atol=1e-5)
        tail = logprobs[order[6:]].exp().sum().log()
        assert topk.log_tail[row].item() == pytest.approx(tail.item(), abs=1e-5)
        top_logits = topk.logprobs[row] + topk.log_normaliser[row]
        assert torch.allclose(top_logits, logits[row, order[:6]], atol=1e-4)


def test_a_tiny_tail_keeps_its_digits() -> None:
    logits = torch.tensor([[0.0, -30.0, -30.0]])
    assert encode_topk(logits, 1).log_tail.item() == pytest.approx(-30 + math.log(2), abs=1e-4)


def test_topk_of_everything_has_no_tail() -> None:
    topk = encode_topk(peaked_logits(2, 5), 5)
    assert topk.log_tail.tolist() == [-math.inf, -math.inf]
    back: TopK = unpack_topk(pack_topk(topk, 5), 5)
    assert torch.allclose(back.logprobs, topk.logprobs, atol=1e-2)


def test_samples_are_unbiased() -> None:
    logits = peaked_logits(3, 40) / 2
    probs = logits.softmax(-1)
    runs = 400
    mean = torch.zeros_like(probs)
    for seed in range(runs):
        mean += decode_samples(encode_samples(logits, uniforms(3, 16, seed)), 40) / runs
    stderr = (probs * (1 - probs) / (16 * runs)).sqrt()
    assert ((mean - probs).abs() <= 4.5 * stderr + 1e-7).all()


def test_samples_equal_counting_one_draw_at_a_time() -> None:
    logits, numbers = peaked_logits(6, 30), uniforms(6, 12)
    samples = encode_samples(logits, numbers)
    for row in range(6):
        edges = logits[row].double().softmax(-1).cumsum(-1).tolist()
        drawn = [sum(edge <= number for edge in edges) for number in numbers[row].tolist()]
        distinct = sorted(set(drawn))
        padding = 12 - len(distinct)
        assert samples.token_ids[row].tolist() == distinct + [-1] * padding
        assert samples.counts[row].tolist() == [drawn.count(t) for t in distinct] + [0] * padding


def test_impossible_tokens_are_never_drawn() -> None:
    logits = torch.tensor([[-math.inf, 0.0, -math.inf, 0.0, -math.inf]])
    edges = torch.tensor([[0.0, 0.25, 0.5, 0.75, 1 - 2**-53]], dtype=torch.float64)
    samples = encode_samples(logits, edges)
    assert samples.token_ids.tolist() == [[1, 3, -1, -1, -1]]
    assert samples.counts.tolist() == [[2, 3, 0, 0, 0]]


@pytest.mark.parametrize("draws", [1, 2, 33])
def test_packed_samples_come_back(draws: int) -> None:
    samples = encode_samples(peaked_logits(9, 300), uniforms(9, draws))
    back = unpack_samples(pack_samples(samples, 300), draws, 300)
    assert torch.equal(back.token_ids, samples.token_ids)
    assert torch.equal(back.counts, samples.counts)


def test_error_falls_with_bytes() -> None:
    """Bytes per token against KL(expert, decoded) in nats, for growing k."""
    logits = peaked_logits(64, 512)
    target = logits.log_softmax(-1)
    sizes, errors = [], []
    for top_k in (1, 2, 4, 8, 16, 64, 256):
        columns = pack_topk(encode_topk(logits, top_k), 512)
        sizes.append(sum(column.nbytes for column in columns.values()) / 64)
        decoded = decode_topk(unpack_topk(columns, 512), 512)
        errors.append((target.exp() * (target - decoded)).sum(-1).mean().item())
    assert sizes == sorted(sizes)
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-3
