"""Our logits from the hidden state are the model's own, for every family that we name."""

import pytest
import torch
import transformers
from torch import nn

from trimtab.backends.hf import adopt_model
from trimtab.backends.open import open_model
from trimtab.backends.tiny import parse_tiny, tiny_tokenizer
from trimtab.errors import ModelError
from trimtab.unembedding import BLOCK_TOKENS, Unembedding, weight_sha256

_DECODER = {
    "vocab_size": 272,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "bos_token_id": 256,
    "eos_token_id": 257,
    "pad_token_id": 258,
}
_T5 = {
    "vocab_size": 272,
    "d_model": 32,
    "d_ff": 48,
    "d_kv": 8,
    "num_layers": 2,
    "num_heads": 4,
    "eos_token_id": 257,
    "pad_token_id": 258,
    "decoder_start_token_id": 258,
}
_MARIAN = {
    "vocab_size": 272,
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "eos_token_id": 257,
    "pad_token_id": 258,
    "decoder_start_token_id": 258,
}
_GPT2 = {"vocab_size": 272, "n_embd": 32, "n_layer": 2, "n_head": 4, "bos_token_id": 256}
_TEXT_FAMILIES = {
    "Llama": _DECODER,
    "Mistral": _DECODER,
    "Qwen2": _DECODER,
    "Qwen3": _DECODER | {"head_dim": 8},
    "Gemma": _DECODER | {"head_dim": 8},
    "Gemma2": _DECODER | {"head_dim": 8, "final_logit_softcapping": 3.0},
    "Gemma3Text": _DECODER | {"head_dim": 8},
    "Granite": _DECODER | {"logits_scaling": 7.0},
    "Cohere": _DECODER | {"logit_scale": 0.0625},
    "Cohere2": _DECODER | {"logit_scale": 0.25},
    "Phi": _DECODER,
    "Phi3": _DECODER,
    "Olmo2": _DECODER,
    "GPT2": _GPT2 | {"eos_token_id": 257},
    "GPTNeoX": {k: v for k, v in _DECODER.items() if k != "num_key_value_heads"},
    "T5": _T5,
    "Marian": _MARIAN,
    "Bart": _MARIAN,
}


def _make(family, settings):
    config = getattr(transformers, f"{family}Config")(**settings)
    auto = transformers.AutoModelForCausalLM
    if config.is_encoder_decoder:
        auto = transformers.AutoModelForSeq2SeqLM
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = auto.from_config(config, dtype=torch.float32)
        if family == "T5" and not settings.get("tie_word_embeddings", True):
            # As in T5 1.1: transformers ties every T5 but those whose checkpoint has two tables.
            model.lm_head.weight = nn.Parameter(torch.randn(272, 32))
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if name.endswith(("lm_head.bias", "final_logits_bias")):
                nn.init.normal_(tensor)
    return model


def _adopt(model, ref="made for the test"):
    return adopt_model(ref, model, tiny_tokenizer(parse_tiny("tiny:llama")))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", _TEXT_FAMILIES)
def test_logits_of_the_hidden_state_are_the_models_own(family, tied):
    made = _make(family, _TEXT_FAMILIES[family] | {"tie_word_embeddings": tied})
    model = _adopt(made)
    input_weight = made.get_input_embeddings().weight
    assert (model.unembedding.weight is input_weight) is tied
    ids = torch.tensor([[1, 50, 200, 7, 7], [9, 8, 7, 6, 5]])
    with torch.no_grad():
        ours, some = (model.unembedding.logits(model.hidden(ids), t) for t in (None, ids[0]))
        linear = model.unembedding.linear(model.logits(ids))
        expected_linear = model.hidden(ids) @ model.unembedding.weight.T
    own = model.logits(ids)
    torch.testing.assert_close(ours, own, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(some, own[..., ids[0]], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(linear, expected_linear, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("family", "field", "expected"),
    [
        ("Gemma2", "softcap", 3.0),
        ("Granite", "scale", 1 / 7),
        ("Cohere", "scale", 0.0625),
        ("T5", "scale", 32**-0.5),
        ("Llama", "scale", 1.0),
    ],
)
def test_what_a_family_does_to_its_logits_is_read(family, field, expected):
    unembedding = _adopt(_make(family, _TEXT_FAMILIES[family])).unembedding
    assert getattr(unembedding, field) == pytest.approx(expected)


@pytest.mark.parametrize("family", ["Phi", "Marian"])
def test_a_bias_is_read(family):
    unembedding = _adopt(_make(family, _TEXT_FAMILIES[family])).unembedding
    assert unembedding.bias is not None
    assert unembedding.bias.shape == (272,)
    assert unembedding.bias.abs().max() > 0.1


class _Capped(nn.Linear):
    def forward(self, states):
        logits = super().forward(states)
        return 50 * torch.tanh(logits / 50)


def test_a_head_that_caps_unannounced_is_refused_although_small_logits_hide_it():
    model = _make("Llama", _DECODER)
    head = _Capped(32, 272, bias=False)
    head.weight = model.lm_head.weight
    model.lm_head = head
    with pytest.raises(ModelError, match="cannot be told from its hidden states"):
        _adopt(model)


def test_an_unknown_scale_is_refused():
    model = _make("Granite", _TEXT_FAMILIES["Granite"])
    model.lm_head.register_forward_hook(lambda _module, _inputs, logits: logits * 1.1)
    with pytest.raises(ModelError, match="cannot be told"):
        _adopt(model)


def test_the_check_leaves_the_model_bit_for_bit():
    model = _make("Gemma2", _TEXT_FAMILIES["Gemma2"]).eval()
    ids = torch.tensor([[1, 2, 3]])
    with torch.no_grad():
        before = model(ids).logits
    _adopt(model)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, before)


def test_padded_rows_stand_for_no_text():
    model = _adopt(_make("Llama", _DECODER))
    assert len(model.vocabulary) == 272
    assert model.vocabulary.token_bytes[256:] == (None,) * 16


def test_the_fingerprint_sees_every_row_and_ignores_the_dtype_of_loading():
    weight = open_model("tiny:llama", dtype="float32").unembedding.weight.detach().clone()
    sha256 = weight_sha256(weight)
    assert weight_sha256(weight.bfloat16()) == sha256
    for row, column in [(0, 0), (100, 31), (258, 63)]:
        changed = weight.clone()
        changed[row, column] += 0.01
        assert weight_sha256(changed) != sha256
    assert weight_sha256(weight.T.contiguous()) != sha256


def test_auto_arithmetic_opens_and_agrees_with_the_models_own_logits():
    for family in ("llama", "gemma2", "t5"):
        model = open_model(f"tiny:{family}")
        ids = torch.tensor([[1, 2, 3]])
        with torch.no_grad():
            ours = model.unembedding.logits(model.hidden(ids)).float()
        torch.testing.assert_close(ours, model.logits(ids).float(), rtol=0.02, atol=0.01)


@pytest.mark.parametrize("is_chosen", [False, True])
@pytest.mark.parametrize("shape", [(7,), (2, 3)])
def test_logits_by_blocks_are_those_of_one_product(is_chosen: bool, shape: tuple[int, ...]) -> None:
    draw = torch.Generator().manual_seed(0)
    tokens = 2 * BLOCK_TOKENS + 5
    weight, bias = torch.randn(tokens, 24, generator=draw), torch.randn(tokens, generator=draw)
    unembedding = Unembedding(weight, bias=bias, scale=0.3, softcap=5.0)
    hidden = torch.randn(*shape, 24, generator=draw)
    chosen = torch.randperm(tokens, generator=draw)[: tokens - 3] if is_chosen else None
    expected = 5.0 * torch.tanh((hidden @ weight.T * 0.3 + bias) / 5.0)
    expected = expected if chosen is None else expected[..., chosen]
    torch.testing.assert_close(unembedding.logits(hidden, chosen), expected)
    followed = unembedding.logits(hidden.requires_grad_(), chosen)
    torch.testing.assert_close(followed, expected)
    (gradient,) = torch.autograd.grad(followed.sum(), hidden)
    assert gradient.abs().min() > 0


def test_states_may_lie_elsewhere_than_the_head() -> None:
    unembedding = Unembedding(torch.zeros(9, 4, device="meta"), scale=0.5)
    assert unembedding.logits(torch.zeros(2, 3, 4)).device == unembedding.device
