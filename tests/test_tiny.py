"""The toy family: reproducible, savable, clear about what it does not have."""

import pytest
import torch

from trimtab.backends.open import open_model
from trimtab.backends.tiny import TINY_FAMILIES, parse_tiny
from trimtab.errors import ModelError


def _ids(model, text="A small rudder turns."):
    return torch.tensor([[*model.context_ids(), *model.encode(text)]])


@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_a_tiny_model_is_not_being_trained(family):
    assert not open_model(f"tiny:{family}", dtype="float32").model.training


def test_the_seed_alone_decides_the_weights():
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = open_model("tiny:llama?seed=7", dtype="float32")
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    again = open_model("tiny:llama?seed=7", dtype="float32")
    other = open_model("tiny:llama?seed=8", dtype="float32")
    assert torch.equal(first.logits(_ids(first)), again.logits(_ids(again)))
    assert first.fingerprint == again.fingerprint
    assert first.fingerprint.unembedding_sha256 != other.fingerprint.unembedding_sha256
    assert first.fingerprint.vocabulary_sha256 == other.fingerprint.vocabulary_sha256


@pytest.mark.parametrize("family", TINY_FAMILIES)
@pytest.mark.parametrize("vocab", ["bytes", "bpe"])
def test_a_saved_tiny_model_opens_as_the_same_model(tmp_path, family, vocab):
    made = open_model(f"tiny:{family}?vocab={vocab}&layers=1", dtype="float32")
    made.model.save_pretrained(tmp_path)
    made.tokenizer.save_pretrained(tmp_path)
    opened = open_model(str(tmp_path), dtype="float32")
    assert opened.vocabulary == made.vocabulary
    assert opened.fingerprint == made.fingerprint
    text = "pub fn add(a: i32) <eos> Größe 🦄"
    assert opened.encode(text) == made.encode(text)
    ours, theirs = opened.model.state_dict(), made.model.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    # Weights mapped from a file lie anywhere, and some processors sum differently there.
    for weight in opened.model.parameters():
        weight.data = weight.data.clone()
    assert torch.equal(opened.logits(_ids(opened)), made.logits(_ids(made)))


def test_bfloat16_equals_a_saved_folder_opened_in_bfloat16(tmp_path):
    exact = open_model("tiny:llama", dtype="float32")
    exact.model.save_pretrained(tmp_path)
    exact.tokenizer.save_pretrained(tmp_path)
    made = open_model("tiny:llama", dtype="bfloat16")
    opened = open_model(str(tmp_path), dtype="bfloat16")
    assert torch.equal(opened.logits(_ids(opened)), made.logits(_ids(made)))


def test_settings_are_read():
    model = open_model("tiny:gemma2?hidden=48&layers=3&heads=2&vocab=bpe&tied=0", dtype="float32")
    assert model.unembedding.weight.shape == (512, 48)
    assert model.model.config.num_hidden_layers == 3
    head = model.model.get_output_embeddings().weight
    assert head is not model.model.get_input_embeddings().weight


def test_byte_tokens_are_their_bytes():
    model = open_model("tiny:llama", dtype="float32")
    assert model.vocabulary.token_bytes == (*(bytes([b]) for b in range(256)), None, None, None)
    assert model.encode("é\n") == [0xC3, 0xA9, 0x0A]


def test_the_bpe_has_words_and_every_byte():
    vocabulary = open_model("tiny:llama?vocab=bpe", dtype="float32").vocabulary
    ids = vocabulary.ids_by_bytes
    assert len(vocabulary) == 512
    assert all(bytes([byte]) in ids for byte in range(256))
    assert {b" the", b" return", b"values"} <= ids.keys()
    assert len(ids) == 512 - 3


@pytest.mark.parametrize(
    ("ref", "finding"),
    [
        ("tiny:bert", "no toy model 'bert'"),
        ("tiny:llama?width=3", "width='3'"),
        ("tiny:llama?hidden=wide", "hidden='wide'"),
        ("tiny:llama?vocab=words", "vocab='words'"),
        ("tiny:llama?tied=2", "tied='2'"),
        ("tiny:llama?hidden=66", "width 66"),
        ("tiny:llama?layers=0", "0 layers"),
    ],
)
def test_a_wrong_tiny_name_says_what_there_is(ref, finding):
    with pytest.raises(ModelError, match=finding) as caught:
        parse_tiny(ref)
    assert caught.value.hint


def test_chat_text_encodes_to_special_tokens_only_as_markup():
    model = open_model("tiny:llama", dtype="float32")
    text = model.chat_text([{"role": "user", "content": "hi"}])
    assert text == "<user>hi<eos><assistant>"
    assert model.vocabulary.eos_id in model.encode(text, markup=True)
    assert model.encode(text) == list(text.encode())
    model.tokenizer.chat_template = None
    with pytest.raises(ModelError, match="no chat template"):
        model.chat_text([{"role": "user", "content": "hi"}])
    model.tokenizer.chat_template = "{{ raise_exception('no such role') }}"
    with pytest.raises(ModelError, match="no such role"):
        model.chat_text([{"role": "user", "content": "hi"}])


def test_right_padding_changes_nothing_under_a_mask():
    for family in ("llama", "gemma2", "t5"):
        model = open_model(f"tiny:{family}", dtype="float32")
        ids = _ids(model)
        padded = torch.nn.functional.pad(ids, (0, 5), value=model.tokenizer.pad_token_id)
        mask = (torch.arange(padded.shape[1]) < ids.shape[1]).long()[None]
        alone, masked = model.hidden(ids), model.hidden(padded, attention_mask=mask)
        torch.testing.assert_close(masked[:, : ids.shape[1]], alone)


def test_an_encoder_decoder_reads_its_source():
    model = open_model("tiny:t5", dtype="float32")
    ids = _ids(model)
    source = torch.tensor([model.encode("pull the tab")])
    given = model.hidden(ids, encoder_ids=source)
    assert not torch.equal(given, model.hidden(ids))
    with torch.no_grad():
        ours = model.unembedding.logits(given)
    torch.testing.assert_close(ours, model.logits(ids, encoder_ids=source))


def test_expected_first_tokens():
    assert open_model("tiny:llama", dtype="float32").context_ids() == []
    assert open_model("tiny:gemma3", dtype="float32").context_ids() == [256]
    assert open_model("tiny:t5", dtype="float32").context_ids() == [258]
