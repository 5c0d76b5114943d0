"""Tokens of a host behind an API: from its tokenizer, or from what it shows."""

from pathlib import Path

import pytest
import tiktoken

from trimtab.backends.open import open_model
from trimtab.errors import ModelError
from trimtab.hosted.answers import Token
from trimtab.hosted.tokens import (
    ToldTokens,
    known_from_tiktoken,
    open_known,
    shown_ids,
)


@pytest.fixture
def encoding() -> tiktoken.Encoding:
    """A small byte-level BPE, whose merges are in the order of their ranks."""
    merges = [b"th", b"the", b" t", b" the", b"ke", b"el", b"keel"]
    ranks = {bytes([byte]): byte for byte in range(256)}
    ranks |= {text: 256 + number for number, text in enumerate(merges)}
    special = {"<|endoftext|>": len(ranks), "[stop]": len(ranks) + 1, "<|begin|>": len(ranks) + 2}
    pattern = r" ?\w+|\W"
    return tiktoken.Encoding("toy", pat_str=pattern, mergeable_ranks=ranks, special_tokens=special)


def test_a_tiktoken_encoding_is_read(encoding: tiktoken.Encoding) -> None:
    known = known_from_tiktoken(encoding)
    ids = known.encode("the keel, <|endoftext|>")
    assert ids == encoding.encode_ordinary("the keel, <|endoftext|>")
    texts = known.vocabulary.token_bytes
    assert b"".join(texts[i] or b"" for i in ids) == b"the keel, <|endoftext|>"
    end = encoding.encode_single_token("<|endoftext|>")
    assert known.end_ids == {end} and known.vocabulary.eos_id == end
    assert texts[end] is None and texts[end + 1] is None
    assert known.strings.first_token(b"they") == encoding.encode_ordinary("they")[0]
    assert known.context_ids() == []


def test_ids_of_what_an_api_shows(encoding: tiktoken.Encoding) -> None:
    known = known_from_tiktoken(encoding)
    the = encoding.encode_single_token(b" the")
    assert known.id_of(Token(b" the", -1.0, " the")) == the
    assert known.id_of(Token(b" the", -1.0, " the", the)) == the
    # A number that means another text is not believed.
    assert known.id_of(Token(b" the", -1.0, " the", 3)) == the
    assert known.id_of(Token(None, -1.0, "<|begin|>")) == encoding.n_vocab - 1
    assert known.id_of(Token(b"unknown", -1.0, "unknown")) is None
    # Taken for text by its name, which the tokenizer knows as one that stands for none.
    assert known.id_of(Token(b"[stop]", -1.0, "[stop]")) == encoding.n_vocab - 2
    # One that has ended a text, under a name of the API's own.
    assert known.id_of(Token(None, -1.0, "<done>")) is None
    assert known.id_of(Token(None, -1.0, "<done>", ends=True)) == encoding.n_vocab - 3


def test_a_models_own_tokenizer_is_the_hosts() -> None:
    ref = "tiny:qwen3?vocab=bpe"
    known, model = open_known(ref), open_model(ref, dtype="float32")
    assert known.vocabulary.token_bytes == model.vocabulary.token_bytes
    assert known.end_ids == model.end_ids
    text = "The rudder turns the ship €"
    assert known.encode(text) == model.encode(text)
    assert known.following(text) == model.encode_following(text)
    assert open_known("tiny:gemma3").context_ids() == open_model("tiny:gemma3").context_ids()


@pytest.mark.parametrize("ref", ["owner/name", "tiktoken:nosuch", "tiny:nosuch"])
def test_tokenizers_that_are_not_there(ref: str) -> None:
    with pytest.raises(ModelError) as error:
        open_known(ref)
    assert error.value.hint


def test_a_folder_without_a_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="tokenizer"):
        open_known(str(tmp_path))


def test_what_begins_with_a_shown_token_is_not_one_token() -> None:
    shown = [Token(b" th", -0.5, " th"), Token(None, -2.0, "<eos>"), Token(b"a", -3.0, "a")]
    told = ToldTokens.of(shown, [b" the", b" t", b" keel", b"ab", b" keel"])
    assert told.vocabulary.token_bytes == (b" th", b"a", b" t", b" keel", None)
    assert told.ids_of(shown) == [0, 4, 1]
    assert told.strings.first_token(b" there") == 0


def test_one_id_gets_the_sum_of_all_that_stand_for_it() -> None:
    shown = [Token(b"a", -1.0), Token(b"b", -2.0), Token(b"a", -1.0), Token(b"c", -3.0)]
    found = shown_ids(shown, [4, 5, 4, None])
    assert found == {4: pytest.approx(-1.0 + 0.6931472), 5: -2.0}
