"""The cost model's formulas against torch's counter, real configurations, and by hand."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config

from trimtab.carriers.search import LISTED_ENTRIES, PROBED_SHARE
from trimtab.config import FitConfig
from trimtab.costing import flops, memory, serving
from trimtab.costing.memory import Load
from trimtab.costing.ranges import Range
from trimtab.costing.sheet import Shape, read_sheet
from trimtab.errors import InputError
from trimtab.fitting.head import ALWAYS, DRAWN, HeadData, HeadSettings, fit_head

TOKENS = 24
PARAMS = st.floats(5e7, 1e12)


def tiny(*, tied: bool = False) -> tuple[torch.nn.Module, Shape]:
    """A small Llama, and the shape that the cost model has of it."""
    config = LlamaConfig(
        hidden_size=32, intermediate_size=80, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, vocab_size=96, tie_word_embeddings=tied,
        attn_implementation="eager",
    )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    params = sum(weight.numel() for weight in model.parameters())
    shape = Shape(
        name="tiny", params=params, layers=3, hidden=32, attention=32, key_value=16,
        feed_forward=80, vocab=96, tied=tied, address="here",
    )  # fmt: skip
    return model, shape


def counted(model: torch.nn.Module, *, backward: bool) -> int:
    """Operations of matrix products that torch itself counts."""
    ids = torch.arange(TOKENS)[None]
    counter = FlopCounterMode(display=False)
    with counter:
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        if backward:
            loss.backward()
    return counter.get_total_flops()


def norms(shape: Shape) -> int:
    """Weights that the model holds but no matrix product has: the norms' gains."""
    return (2 * shape.layers + 1) * shape.hidden


@pytest.mark.parametrize("tied", [False, True])
def test_a_forward_pass_is_what_torch_counts(tied: bool) -> None:
    model, shape = tiny(tied=tied)
    # The eager attention computes scores to all tokens and masks the later ones.
    ours = TOKENS * (flops.forward_flops(shape, TOKENS) - 2 * norms(shape))
    assert counted(model, backward=False) == pytest.approx(ours, rel=1e-12)


def test_full_training_is_three_forward_passes() -> None:
    model, shape = tiny()
    ours = TOKENS * (flops.full_training_flops(shape, TOKENS) - 6 * norms(shape))
    assert counted(model, backward=True) == pytest.approx(ours, rel=1e-12)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_lora_training_is_what_torch_counts() -> None:
    model, shape = tiny()
    wrapped = get_peft_model(
        model, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    )
    trained = sum(w.numel() for w in wrapped.parameters() if w.requires_grad)
    assert flops.lora_params(shape, 4) == trained
    ours = TOKENS * (flops.lora_training_flops(shape, TOKENS, 4) - 4 * norms(shape))
    # Nothing before the first layer is trained: its projections pass no gradient to their input.
    first = 2 * TOKENS * (shape.hidden * (shape.attention + 2 * shape.key_value) + 3 * 4 * 32)
    assert counted(wrapped, backward=True) == pytest.approx(ours - first, rel=1e-12)


def test_hidden_states_leave_the_head_out() -> None:
    model, shape = tiny()
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        model.model(input_ids=torch.arange(TOKENS)[None], use_cache=False)
    ours = TOKENS * (flops.hidden_flops(shape, TOKENS) - 2 * norms(shape))
    assert counter.get_total_flops() == pytest.approx(ours, rel=1e-12)


def test_a_head_compares_as_many_tokens_as_is_counted() -> None:
    assert flops.HeadFit(1, 1).compared == ALWAYS + DRAWN
    assert FitConfig.model_fields["active_tokens"].default == flops.ACTIVE


def test_a_heads_fit_is_what_torch_counts() -> None:
    positions, hidden, active, rank = 1024, 16, 40, 4
    states, rows = torch.randn(positions, hidden), torch.randn(active, hidden)

    def logits(batch: torch.Tensor, compared: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return states[batch] @ rows[compared].T, states[batch] @ rows[compared].T

    data = HeadData(states, logits, torch.ones(positions))
    counter = FlopCounterMode(display=False)
    with counter:
        fit_head(
            data, rows, (torch.zeros(hidden), torch.ones(hidden)), HeadSettings(rank, 2, 1e-3, 0)
        )
    ours = flops.head_fit_flops(flops.HeadFit(positions, hidden, active, rank, epochs=2))
    # torch counts a matrix times a vector (the offset) as nothing.
    vectors = 2 * positions * 4 * active * hidden / flops.HEAD_BATCH_POSITIONS
    assert counter.get_total_flops() == pytest.approx(ours - vectors, rel=1e-12)


@pytest.mark.parametrize("shape", read_sheet().shapes, ids=lambda shape: shape.name)
def test_the_sheets_shapes_have_their_models_parameters(shape: Shape) -> None:
    tables = (1 if shape.tied else 2) * shape.vocab * shape.hidden
    attention = 2 * shape.hidden * (shape.attention + shape.key_value)
    layer = attention + 3 * shape.hidden * shape.feed_forward + 2 * shape.hidden
    computed = tables + shape.layers * layer + shape.hidden
    # Qwen has biases and Gemma more norms, which are no matrices.
    small = shape.layers * (shape.attention + 2 * shape.key_value + 2 * shape.hidden + 512)
    assert 0 <= shape.params - computed <= small
    assert computed == shape.params or shape.name.startswith(("Qwen", "Gemma"))


def test_a_sheet_shape_is_the_model_that_transformers_builds() -> None:
    shape = next(shape for shape in read_sheet().shapes if shape.name == "Qwen2.5-7B")
    config = Qwen2Config(
        hidden_size=shape.hidden, intermediate_size=shape.feed_forward,
        num_hidden_layers=shape.layers, num_attention_heads=28,
        num_key_value_heads=shape.key_value // 128, vocab_size=shape.vocab,
        tie_word_embeddings=shape.tied,
    )  # fmt: skip
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert sum(weight.numel() for weight in model.parameters()) == shape.params


def test_a_shape_is_that_of_the_nearest_model_with_the_asked_parameters() -> None:
    sheet = read_sheet()
    assert sheet.shape(70e9).name == "Llama 3.1 70B" and sheet.shape(70e9).params == 70e9
    assert sheet.shape(7e9).name == "Qwen2.5-7B"
    assert sheet.shape(5e7).name == "SmolLM2-135M"
    assert sheet.shape(5e7).matmul_params == 5e7


def test_textbook_numbers_by_hand() -> None:
    shape = read_sheet().shape(70.553706496e9)
    weights = 70.553706496e9 - 128256 * 8192
    assert flops.forward_flops(shape, 0) == 2 * weights
    # 80 layers of 8192 wide attention, 1000 tokens back: 4 * 80 * 8192 * 1000.
    assert flops.forward_flops(shape, 1000) - flops.forward_flops(shape, 0) == 2.62144e9
    assert memory.cache_bytes(shape) == 2 * 2 * 80 * 1024
    assert memory.full_state_bytes(shape, Range(16, 16)).low == pytest.approx(1128.86e9, rel=1e-4)
    assert memory.lora_state_bytes(shape, 16) == pytest.approx(
        2 * 70.553706496e9 + 16 * 207_093_760
    )
    assert flops.memory_search_flops(1000, 192) == 384_000
    assert flops.memory_search_flops(2**20, 192) == 2 * 192 * (1024 + 131_072)
    assert (flops.LISTED_ENTRIES, flops.PROBED_SHARE) == (LISTED_ENTRIES, PROBED_SHARE)
    assert flops.map_flops(10, shape, shape, 0) == pytest.approx(
        2 * 10 * 8192 * 16384 + (1 / 3 + 2) * 8192**3 * 2
    )


def test_published_memory_and_parameters_are_met() -> None:
    sheet = read_sheet()
    shape = sheet.shape(65e9)
    # QLoRA's paper: 65B below 48 GB; full fine-tuning of it above 780 GB with 12 bytes each.
    assert memory.qlora_state_bytes(shape, 16) < 48e9
    assert memory.full_state_bytes(shape, Range(12, 12)).low == 780e9
    assert memory.gpus_for_training(
        memory.qlora_state_bytes(shape, 16), shape, 512, sheet.gpu("l40s")
    ) == 1  # fmt: skip


@pytest.mark.parametrize(
    ("asked", "rented"), [(0, 1), (1, 1), (2, 2), (3, 4), (5, 8), (8, 8), (9, 16), (17, 24)]
)
def test_gpus_are_rented_as_machines_have_them(asked: int, rented: int) -> None:
    assert memory.whole_machines(asked) == rented


def test_a_window_that_fits_no_gpu_fits_no_number_of_them() -> None:
    sheet = read_sheet()
    shape = sheet.shape(70e9)
    assert memory.gpus_for_training(1e15, shape, 10_000_000, sheet.gpu("h100")) is None


def server(gpus: int = 4) -> serving.Server:
    return serving.Server(read_sheet().gpu("h100"), gpus, Range(0.5, 0.5), Range(0.5, 0.5))


def test_decoding_is_bound_by_bandwidth_and_then_by_computation() -> None:
    shape = read_sheet().shape(70e9)
    one = serving.decode_sec(shape, Load(1, 0), server()).low
    assert one == pytest.approx(140e9 / (4 * 3.35e12 * 0.5))
    many = serving.decode_sec(shape, Load(100_000, 0), server()).low
    computing = flops.forward_flops(shape, 0) / (4 * 989.4e12 * 0.5)
    assert many == pytest.approx(computing)


def test_money_by_hand() -> None:
    assert serving.usd(Range(3600, 7200), 2, Range(2, 3)) == Range(4, 12)


def test_ranges() -> None:
    both = Range(1, 4)
    assert both + Range(1, 1) == Range(2, 5)
    assert both.times(2) == Range(2, 8) and both.times(Range(2, 3)) == Range(2, 12)
    assert both.over(Range(2, 4)) == Range(0.25, 2)
    assert both.middle == 2 and both.holds(4) and not both.holds(5)
    for low, high in ((2, 1), (-1, 1), (math.nan, 1)):
        with pytest.raises(ValueError, match="0 <= low <= high"):
            Range(low, high)


def test_an_unknown_gpu_names_the_known_ones() -> None:
    with pytest.raises(InputError, match="unknown GPU 'h999'; the sheet has h100, h200") as found:
        read_sheet().gpu("h999")
    assert "--price" in found.value.hint
    assert read_sheet().gpu("RTX 4090") is read_sheet().gpu("rtx4090")


def test_every_figure_of_the_sheet_has_its_source() -> None:
    sheet = read_sheet()
    sources = [gpu.source for gpu in sheet.gpus.values()]
    sources += [offer.source for gpu in sheet.gpus.values() for offer in gpu.offers]
    sources += [source for factor in sheet.factors.values() for source in factor.sources]
    for source in sources:
        assert source.date <= sheet.date, source
        assert source.address.startswith(("https://", "bench/", "src/")), source


@settings(deadline=None, max_examples=50)
@given(PARAMS, st.floats(1, 100), st.floats(0, 1e6))
def test_larger_models_and_contexts_cost_more(params: float, more: float, attended: float) -> None:
    sheet = read_sheet()
    small, large = sheet.shape(params), sheet.shape(params * more)
    assert flops.hidden_flops(small, 0) < flops.forward_flops(small, 0)
    for formula in (flops.forward_flops, flops.full_training_flops):
        assert formula(small, 0) <= formula(large, 0) * (1 + 1e-9) or small.tied != large.tied
        assert formula(small, attended) <= formula(small, attended + 1)
    forward = flops.forward_flops(small, attended)
    lora = flops.lora_training_flops(small, attended, 8)
    assert 2 * forward <= lora
    assert flops.full_training_flops(small, attended) == pytest.approx(3 * forward)


@settings(deadline=None, max_examples=50)
@given(st.floats(0, 1e13), st.floats(0, 1e13))
def test_more_bytes_never_need_fewer_gpus(some: float, more: float) -> None:
    sheet = read_sheet()
    gpu, shape = sheet.gpu("h100"), sheet.shape(70e9)
    few = memory.gpus_for_training(some, shape, 2048, gpu)
    many = memory.gpus_for_training(some + more, shape, 2048, gpu)
    assert few is not None and many is not None and few <= many
    assert memory.gpus_for_serving(some, gpu) <= memory.gpus_for_serving(some + more, gpu)


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 4096), st.integers(1, 4096), st.floats(1, 1e5))
def test_a_fuller_server_is_cheaper_a_token(few: int, more: int, context: float) -> None:
    shape = read_sheet().shape(7e9)
    lonely = serving.decode_sec(shape, Load(few, context), server())
    busy = serving.decode_sec(shape, Load(few + more, context), server())
    assert busy.low <= lonely.low * (1 + 1e-12) and busy.high <= lonely.high * (1 + 1e-12)
