"""A text that grows is encoded as its whole is, and what it keeps is what it would make anew."""

import random
from collections.abc import Callable
from functools import partial

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_tokenizers import _llama2 as llama2
from test_tokenizers import _metaspace as metaspace
from test_tokenizers import _real_tokenizer as real_tokenizer
from torch import Tensor
from transformers import DynamicCache, PreTrainedTokenizerBase

from trimtab.backends.cache_layers import SPARE_TOKENS, GrowingCache, Room, layers_of
from trimtab.backends.growing_text import GrowingText, cuts_before_words
from trimtab.backends.open import open_model
from trimtab.backends.pair import Pair
from trimtab.backends.reading import PairCaches
from trimtab.backends.tiny import parse_tiny, tiny_tokenizer
from trimtab.backends.token_tree import ModelCache, TokenTree, run_tree
from trimtab.backends.tokenizers import encode_following, encode_plain, read_vocabulary
from trimtab.vocab import Vocabulary

MAKERS: dict[str, Callable[[], PreTrainedTokenizerBase]] = {
    "bytes": lambda: tiny_tokenizer(parse_tiny("tiny:llama?vocab=bytes")),
    "bpe": lambda: tiny_tokenizer(parse_tiny("tiny:llama?vocab=bpe")),
    "llama2": llama2,
    "metaspace": metaspace,
    "smollm2": lambda: real_tokenizer("smollm2-135m-instruct"),
    "gemma3": lambda: real_tokenizer("gemma-3-270m"),
}

PIECES = (
    *("a", "Z", "word", " the rudder", " a", " b", "  c", "'s", " don't", "_x", "const", "é", "ß"),
    *("1", "23", "4567", " 8", "\n", "\n\n", "\n    ", "\t", "\r\n", " ", "  ", "   x", ".", "(b)"),
    *(
        "船",
        "の舵 ",
        "🚢",
        "e\u0301",
        "\u2028",
        "ﬁ",
        "\x1a",
        "<|im_end|>",
        "<eos>",
        " </s> a",
        "<b>",
    ),
)

steady = settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.fixture(scope="module", params=MAKERS)
def tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerBase:
    return MAKERS[request.param]()


@pytest.fixture(scope="module")
def vocabulary(tokenizer: PreTrainedTokenizerBase) -> Vocabulary:
    return read_vocabulary(tokenizer, max(tokenizer.get_vocab().values()) + 1)


def texts_that_grow(seed: int) -> list[str]:
    """Texts each of which goes on from a beginning of the one before."""
    dice, text, found = random.Random(seed), "", list[str]()
    for _ in range(30):
        # As a draft that is refused, or text that is tried with a word behind it.
        text = text[: len(text) - dice.choice([0, 0, 0, 0, 1, 5, 40])]
        text += "".join(dice.choices(PIECES, k=dice.randint(1, 4)))
        found += [text, text + "x"] if dice.random() < 0.2 else [text]
    return found


@steady
@given(seed=st.integers(0, 2**32), follows=st.booleans())
def test_a_text_that_grows_has_the_tokens_of_the_whole(
    tokenizer: PreTrainedTokenizerBase, vocabulary: Vocabulary, seed: int, follows: bool
) -> None:
    begins = partial(encode_plain, tokenizer, prefix_space=vocabulary.prefix_space)
    following = partial(encode_following, tokenizer, vocabulary=vocabulary)
    assert cuts_before_words(begins, following, vocabulary)
    whole = following if follows else begins
    growing = GrowingText(whole, following, vocabulary.token_bytes)
    for text in texts_that_grow(seed):
        assert growing.encode(text) == list(whole(text)), text


def test_only_the_end_of_a_text_is_encoded_anew() -> None:
    asked = list[str]()
    model = open_model("tiny:llama?vocab=bpe", dtype="float32")

    def following(text: str) -> list[int]:
        asked.append(text)
        return model.encode_following(text)

    growing = GrowingText(model.encode, following, model.vocabulary.token_bytes)
    text = "The rudder of a ship, and how it is turned"
    growing.encode(text)
    assert growing.encode(text + " by h") == model.encode(text + " by h")
    assert asked == [" turned by h"]


def test_where_a_token_goes_over_a_space_all_of_a_text_is_encoded() -> None:
    def encode(text: str) -> list[int]:
        return [len(piece) for piece in text.split("n t")]

    assert not cuts_before_words(encode, encode, Vocabulary((b"a", b"n t")))
    assert not cuts_before_words(encode, encode, Vocabulary((b"a", b"n ")))
    # Nor where only trying shows that it looks back.
    assert not cuts_before_words(encode, encode, Vocabulary((b"a", b" t")))
    growing = GrowingText(encode, None, (b"a",))
    assert [growing.encode(text) for text in ("in t", "in t i")] == [[1, 0], [1, 2]]


def test_a_row_keeps_texts_that_begin_apart_from_those_that_follow() -> None:
    model = open_model("tiny:llama?vocab=bpe", dtype="float32")
    caches = PairCaches()
    pair = Pair(model, model)
    begins, follows = (caches.text(pair, follows=follows) for follows in (False, True))
    assert begins is caches.text(pair, follows=False) and begins is not follows
    assert caches.beside().text(pair, follows=False) is not begins


def test_what_grows_in_a_room_is_what_joining_gives() -> None:
    dice, room = random.Random(0), Room()
    held, expected = torch.empty(0), torch.empty(2, 0, 3)
    for _ in range(3 * SPARE_TOKENS):
        kept = max(0, expected.shape[-2] - dice.choice([0, 0, 1, 2]))
        new = torch.rand(2, dice.randint(0, 3), 3)
        held, expected = held[..., :kept, :] if held.dim() > 1 else held, expected[:, :kept]
        held, expected = room.put(held, new), torch.cat([expected, new], 1)
        assert torch.equal(held, expected)


def test_a_room_may_leave_what_it_has_given_as_it_is() -> None:
    room = Room(overwrites=False)
    first = room.put(torch.empty(0), torch.zeros(3, 2))
    second = room.put(first[:2], torch.ones(2, 2))
    third = room.put(second, torch.ones(1, 2))
    assert first.sum() == 0 and second.sum() == 4 and third.sum() == 6
    assert third.data_ptr() == second.data_ptr() != first.data_ptr()


def test_a_room_is_written_to_in_and_outside_inference_mode() -> None:
    room, new = Room(), torch.ones(1, 3)
    with torch.inference_mode():
        held = room.put(torch.empty(0), new)
    assert torch.equal(room.put(held, 2 * new), torch.tensor([[1.0] * 3, [2.0] * 3]))


def grown(cache: DynamicCache, parts: list[Tensor]) -> None:
    for part in parts:
        for layer in range(2):
            cache.update(part + layer, part - layer, layer)


def test_caches_that_part_go_on_by_themselves() -> None:
    first, second, third = (torch.rand(1, 2, size, 4) for size in (5, 2, 3))
    cache = GrowingCache()
    grown(cache, [first])
    other = cache.beside()
    grown(cache, [second])
    cache.crop(-2)
    grown(other, [third])
    grown(cache, [third, second])
    for ours, parts in ((cache, [first, third, second]), (other, [first, third])):
        plain = DynamicCache()
        grown(plain, parts)
        for held, expected in zip(layers_of(ours), layers_of(plain), strict=True):
            assert held is not None and expected is not None
            assert all(map(torch.equal, held, expected))


def test_states_that_part_go_on_by_themselves() -> None:
    model = open_model("tiny:llama?vocab=bpe", dtype="float32")
    lines = ([1, 2, 3, 4], [1, 2, 3, 5, 6], [1, 2, 3, 7])
    cached = ModelCache()
    caches = [cached, cached, cached]
    for number, line in enumerate(lines):
        tree = TokenTree()
        tree.add(line)
        run_tree(model, tree, caches[number])
        caches[2] = cached.beside() if not number else caches[2]
    for found, line in ((caches[1], lines[1]), (caches[2], lines[2])):
        alone = model.hidden(torch.tensor([line]))[0]
        torch.testing.assert_close(found.states, alone, atol=1e-4, rtol=1e-4)


def test_what_new_nodes_see_is_the_end_of_what_all_see() -> None:
    tree = TokenTree()
    for line in ([1, 2, 3, 4, 5], [1, 2, 3], [1, 2, 3, 4, 6, 7], [1, 2, 3, 4, 6, 8]):
        tree.add(line)
    assert tree.trunk() == 4
    for first in range(5):
        assert torch.equal(tree.visible(first), tree.visible()[first:])
    assert tree.parted(7) == (4, [5, 7])
