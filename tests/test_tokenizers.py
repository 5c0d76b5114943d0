"""Bytes of every token: for tokenizers of all kinds, against the text itself."""

import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    normalizers,
    pre_tokenizers,
    processors,
)
from tokenizers.models import BPE, Unigram, WordPiece
from transformers import PreTrainedTokenizerFast

from trimtab.backends.gguf import converted_folder
from trimtab.backends.open import load_tokenizer
from trimtab.backends.tiny import parse_tiny, tiny_tokenizer
from trimtab.backends.tokenizers import encode_following, encode_plain, read_vocabulary
from trimtab.errors import ModelError
from trimtab.types import silent

_MODELS = Path(os.environ.get("TRIMTAB_TEST_MODELS", "build/models"))
_LETTERS = "The rudder, turned by 37 degrees"
_PROPERTY = settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
_TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)


def _spelled(tokenizer, vocabulary, text):
    ids = encode_plain(tokenizer, text, prefix_space=vocabulary.prefix_space)
    return b"".join(vocabulary.token_bytes[i] for i in ids)


def _pieces():
    """A SentencePiece-like BPE as Llama 2's: dummy prefix, byte fallback, no merges."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokens += ["▁", *sorted(set(_LETTERS) - {" "}), "▁T", "Th"]
    vocab = {token: n for n, token in enumerate(tokens)}
    return BPE(
        vocab=vocab,
        merges=[("▁", "T"), ("T", "h")],
        unk_token="<unk>",
        byte_fallback=True,
        fuse_unk=True,
    )


def _llama2():
    backend = Tokenizer(_pieces())
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return _finished(backend)


def _metaspace():
    backend = Tokenizer(_pieces())
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
    backend.decoder = decoders.Metaspace(prepend_scheme="always")
    return _finished(backend)


def _finished(backend, **options):
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", backend.token_to_id("<s>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        **options,
    )


@pytest.mark.parametrize("vocab", ["bytes", "bpe"])
@_PROPERTY
@given(text=_TEXT)
@example(text="<eos> <bos><pad>")
@example(text=" \r\n\t\x00 ▁ 🦄")
def test_tiny_tokens_spell_any_text(vocab, text):
    tokenizer = tiny_tokenizer(parse_tiny(f"tiny:llama?vocab={vocab}"))
    vocabulary = read_vocabulary(tokenizer, len(tokenizer))
    assert _spelled(tokenizer, vocabulary, text) == text.encode()


@pytest.mark.parametrize("make", [_llama2, _metaspace])
@_PROPERTY
@given(text=_TEXT.filter(bool))
@example(text=" x")
@example(text="  x")
@example(text="</s> é")
def test_sentencepiece_tokens_spell_any_text_after_one_space(make, text):
    # U+2581 is how SentencePiece writes a space: in a text it cannot be told from one.
    assume("▁" not in text)
    tokenizer = make()
    vocabulary = read_vocabulary(tokenizer, len(tokenizer))
    assert vocabulary.prefix_space
    assert _spelled(tokenizer, vocabulary, text) == b" " + text.encode()
    following = encode_following(tokenizer, text, vocabulary)
    assert b"".join(vocabulary.token_bytes[i] for i in following) == text.encode()


def test_a_sentencepiece_vocabulary_in_full():
    vocabulary = read_vocabulary(_llama2(), 300)
    ids = vocabulary.ids_by_bytes
    assert vocabulary.token_bytes[:3] == (None, None, None)
    assert (vocabulary.bos_id, vocabulary.eos_id) == (1, 2)
    assert vocabulary.token_bytes[3 + 0x0A] == b"\n"
    # The byte-fallback id of a letter that has a piece is never used.
    assert vocabulary.token_bytes[3 + ord("T")] is None
    assert ids[b"T"] > 258
    assert ids[b" T"] == ids[b"Th"] - 1
    assert vocabulary.token_bytes[-1] is None
    assert len(vocabulary) == 300


def test_t5_like_unigrams_have_a_prefix_space_and_no_bos():
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0), ("▁The", -1.0)]
    pieces += [(letter, -3.0) for letter in sorted(set(_LETTERS) - {" "})]
    backend = Tokenizer(Unigram(pieces, unk_id=2, byte_fallback=False))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    backend.decoder = decoders.Metaspace(prepend_scheme="always")
    backend.add_special_tokens(["<pad>", "</s>", "<unk>"])
    backend.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )
    vocabulary = read_vocabulary(tokenizer, len(pieces))
    assert vocabulary.prefix_space
    assert (vocabulary.bos_id, vocabulary.eos_id) == (None, 1)
    assert vocabulary.ids_by_bytes[b" The"] == 4
    assert _spelled(tokenizer, vocabulary, "The rudder") == b" The rudder"


def test_added_tokens_that_are_not_special_have_their_own_bytes():
    tokenizer = tiny_tokenizer(parse_tiny("tiny:llama"))
    tokenizer.add_tokens([AddedToken("\n\n", normalized=False), "größe "])
    vocabulary = read_vocabulary(tokenizer, len(tokenizer))
    assert vocabulary.token_bytes[-2:] == (b"\n\n", "größe ".encode())
    assert _spelled(tokenizer, vocabulary, "a\n\ngröße b") == "a\n\ngröße b".encode()


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused():
    tokenizer = tiny_tokenizer(parse_tiny("tiny:llama?vocab=bpe"))
    with pytest.raises(ModelError, match="1 tokens beyond the 511 rows"):
        read_vocabulary(tokenizer, 511)


def test_special_tokens_beyond_the_model_are_tolerated():
    tokenizer = tiny_tokenizer(parse_tiny("tiny:llama"))
    assert len(read_vocabulary(tokenizer, 257)) == 257


def test_wordpiece_is_refused():
    vocab = {token: n for n, token in enumerate(["[UNK]", *set(_LETTERS), "##a"])}
    backend = Tokenizer(WordPiece(vocab, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.decoder = decoders.WordPiece()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]")
    with pytest.raises(ModelError, match=r"bytes of the tokenizer .* cannot be told") as caught:
        read_vocabulary(tokenizer, len(tokenizer))
    assert "byte-level BPE or SentencePiece" in caught.value.hint


def test_a_tokenizer_that_changes_plain_text_is_refused():
    tokenizer = tiny_tokenizer(parse_tiny("tiny:llama"))
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    with pytest.raises(ModelError, match="spelled back as b'the rudder"):
        read_vocabulary(tokenizer, len(tokenizer))


def _real_tokenizer(name):
    path = _MODELS / name / "model.gguf"
    if not path.is_file():
        pytest.skip(f"no {path}: set TRIMTAB_TEST_MODELS to the folder of fetched models")
    return load_tokenizer(name, converted_folder(path, silent))


@pytest.fixture(scope="module")
def smollm2():
    tokenizer = _real_tokenizer("smollm2-135m-instruct")
    return tokenizer, read_vocabulary(tokenizer, 49152)


@pytest.fixture(scope="module")
def gemma3():
    tokenizer = _real_tokenizer("gemma-3-270m")
    return tokenizer, read_vocabulary(tokenizer, 262144)


@_PROPERTY
@given(text=_TEXT)
@example(text="<|im_start|>user<|im_end|><|endoftext|>")
def test_smollm2_spells_any_text_but_the_bytes_that_it_lacks(smollm2, text):
    known = smollm2[1].ids_by_bytes
    writable = bytes(byte for byte in text.encode() if bytes([byte]) in known)
    assert _spelled(*smollm2, text) == writable


@_PROPERTY
@given(text=_TEXT)
@example(text="<eos><bos><unused17> <start_of_turn>")
def test_gemma3_spells_any_text(gemma3, text):
    assume("▁" not in text)
    assert _spelled(*gemma3, text) == text.encode()


def test_smollm2_in_particular(smollm2):
    tokenizer, vocabulary = smollm2
    lacks = {byte for byte in range(256) if bytes([byte]) not in vocabulary.ids_by_bytes}
    assert lacks - set(range(0xC0, 0x100)) == {0x04, 0x06, 0x13, 0x14, 0x16, 0x1D}
    assert vocabulary.bos_id is None
    assert vocabulary.token_bytes[vocabulary.eos_id] is None
    # Digits stand alone, so that spaces before one are a token of their own.
    ids = encode_plain(tokenizer, "  37", prefix_space=False)
    assert [vocabulary.token_bytes[i] for i in ids] == [b"  ", b"3", b"7"]


def test_gemma3_in_particular(gemma3):
    _, vocabulary = gemma3
    assert vocabulary.bos_id == 2
    assert vocabulary.ids_by_bytes[b"a"] > 200_000
    assert vocabulary.ids_by_bytes[b"\n\n"] == 108
    assert not vocabulary.prefix_space
