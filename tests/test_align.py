"""Carrying distributions over byte strings, against small vocabularies spelled out."""

import math
import re
from collections.abc import Sequence
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from trimtab.align.candidates import Candidates, FirstTokens
from trimtab.align.carry import Alignment
from trimtab.align.covers import MAX_BACK, Cover, covers_of
from trimtab.align.cut import SHARE_BEYOND, HostCut
from trimtab.align.follow import after_token, rest_to_host, undecided
from trimtab.align.strings import Encode, Strings
from trimtab.backends.hf import HFModel
from trimtab.backends.open import open_model
from trimtab.vocab import Vocabulary

steady = settings(deadline=None, derandomize=True, max_examples=60)
pieces = st.binary(max_size=3).map(lambda raw: bytes(b"ab\xfe\xff"[c % 4] for c in raw))
vocabularies = st.lists(st.one_of(st.none(), pieces), max_size=14).map(
    lambda texts: Vocabulary((b"a", *texts))
)


def alignment(small: Sequence[bytes | None], host: Sequence[bytes | None]) -> Alignment:
    return Alignment(Strings(Vocabulary(tuple(small))), Strings(Vocabulary(tuple(host))))


def distribution(*shape: int, seed: int) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) ** 3


def normalised(weights: Tensor) -> Tensor:
    return weights / weights.sum(-1, keepdim=True)


@steady
@given(vocabulary=vocabularies, start=pieces)
def test_longer_tokens_are_all_that_go_on(vocabulary: Vocabulary, start: bytes) -> None:
    found = Strings(vocabulary).longer_than(start)
    oracle = {
        token_id
        for text, token_id in vocabulary.ids_by_bytes.items()
        if text.startswith(start) and len(text) > len(start)
    }
    assert set(found.tolist()) == oracle and len(found) == len(oracle)
    texts = [vocabulary.token_bytes[i] for i in found.tolist()]
    assert texts == sorted(texts)


@steady
@given(vocabulary=vocabularies, text=pieces)
def test_the_longest_token_is_found(vocabulary: Vocabulary, text: bytes) -> None:
    begins = [s for s in vocabulary.ids_by_bytes if text.startswith(s)]
    oracle = vocabulary.ids_by_bytes[max(begins, key=len)] if begins else -1
    assert Strings(vocabulary).longest_token(text) == oracle


@steady
@given(host=vocabularies, start=pieces, data=st.data())
def test_the_candidate_with_which_a_host_begins_a_text(
    host: Vocabulary, start: bytes, data: st.DataObject
) -> None:
    ids = data.draw(st.lists(st.sampled_from(range(len(host))), min_size=1, unique=True))
    found = Candidates.of(torch.tensor(ids), host)
    texts = [host.token_bytes[i] or b"" for i in ids]
    place = found.first_of(start, Strings(host))
    begins = max((t or b"" for t in host.token_bytes if t and start.startswith(t)), default=b"")
    if begins and begins in texts:
        assert texts[place] == begins
    else:
        assert place == -1


texts = st.text(st.sampled_from("the rudder  \n\tturns, é€😀_(89"), max_size=40)


@cache
def strings_of(ref: str) -> Strings:
    return open_model(ref, dtype="float32").strings


@steady
@given(text=texts)
def test_the_first_token_is_the_tokenizers(text: str) -> None:
    found = strings_of("tiny:llama?vocab=bpe")
    assert found.encode
    first = found.first_token(text.encode())
    assert first == (list(found.encode(text)) or [-1])[0]


@pytest.mark.parametrize("ref", ["tiny:llama?vocab=bpe", "tiny:gemma3"])
@steady
@given(asked=st.lists(st.one_of(texts.map(str.encode), st.binary(max_size=4))))
def test_the_first_tokens_of_many_texts_are_those_of_each(ref: str, asked: list[bytes]) -> None:
    found = strings_of(ref)
    assert found.encode_all
    assert found.first_of_each(asked) == [found.first_token(text) for text in asked]


def test_the_first_token_is_not_always_the_longest() -> None:
    # A tokenizer that joins "nk" before "ta" reads "tank" as "ta" and "nk", though it has "tan".
    vocabulary = Vocabulary((b"ta", b"tan", b"nk", b"k", b"\xe2\x82", b"q"))
    found = Strings(vocabulary, {"tank": [0, 2], "tanq": [5]}.__getitem__)
    assert found.longest_token(b"tank") == 1 and found.first_token(b"tank") == 0
    # Who cannot write the text, or cannot be asked, is taken at the longest.
    assert found.first_token(b"tanq") == 1 and found.first_token(b"\xe2\x82\xe2") == 4
    assert found.first_token(b"tan") == 1 and found.first_token(b"z") == -1


def test_where_no_candidate_is_text_nothing_is_carried() -> None:
    # As where a host is certain that a text ends.
    alignment = Alignment(strings_of("tiny:llama?vocab=bpe"), strings_of("tiny:gemma3"))
    probs = torch.ones(1, len(alignment.small.vocabulary)).softmax(-1)
    none = torch.zeros(0, dtype=torch.long)
    assert alignment.to_host(probs, torch.zeros(1, 0), none).shape == (1, 0)


def test_first_tokens_are_asked_for_once() -> None:
    asked: list[bytes] = []

    def first_tokens(texts: Sequence[bytes]) -> list[int]:
        asked.extend(texts)
        return [len(text) for text in texts]

    found = FirstTokens(Vocabulary((b"a", None, b"abc", b"ab")), first_tokens)
    assert found(torch.tensor([2, 1, 2])).tolist() == [3, -1, 3]
    assert found(torch.tensor([3, 2, 0])).tolist() == [2, 3, 1]
    assert sorted(asked) == [b"a", b"ab", b"abc"]


def test_first_tokens_that_could_not_be_told_are_asked_for_again() -> None:
    answers: list[list[int]] = [[], [7]]
    found = FirstTokens(Vocabulary((b"a",)), lambda _: [answers.pop(0)[0]])
    with pytest.raises(IndexError):
        found(torch.tensor([0]))
    assert found(torch.tensor([0])).tolist() == [7]


@pytest.mark.parametrize("ref", ["tiny:llama?vocab=bpe", "tiny:llama"])
@steady
@given(text=texts)
def test_what_a_tokenizer_does_is_never_forbidden(ref: str, text: str) -> None:
    found = strings_of(ref)
    assert found.encode
    ids = list(found.encode(text))
    pieces = [found.vocabulary.token_bytes[i] or b"" for i in ids]
    for place in range(len(ids) - 1):
        for after in (pieces[place + 1], b"".join(pieces[place + 1 :])):
            assert found.still_ends(ids[place], after)


def test_a_token_does_not_end_inside_another() -> None:
    found = strings_of("tiny:llama?vocab=bpe")
    assert found.encode
    asked = 0
    for token_id, text in enumerate(found.vocabulary.token_bytes):
        word = (text or b"").decode("utf-8", "ignore")
        if len(word) < 2 or not word.strip().isascii() or list(found.encode(word)) != [token_id]:
            continue
        for cut in range(1, len(word.rstrip())):
            first = found.vocabulary.ids_by_bytes.get(word[:cut].encode())
            if first is not None:
                asked += 1
                assert not found.still_ends(first, word[cut:].encode())
    assert asked > 100


def test_who_cannot_be_asked_says_yes() -> None:
    vocabulary = Vocabulary((b"n", b"next", b"ext", b" ", b"\xe2", b"\xe2\x82"))
    own_space = Strings(vocabulary, {"next": [3, 0, 2]}.__getitem__)
    assert own_space.still_ends(0, b"ext")
    joining = Strings(vocabulary, {"next": [1]}.__getitem__)
    assert not joining.still_ends(0, b"ext") and joining.still_ends(4, b"\x82")


def test_what_the_host_does_not_expect_is_still_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trimtab.align.follow.HOST_TOKENS", 2)
    both = alignment([b" rud", b" ", b"r"], [b"a", b"b", b"rudder", b"r"])
    candidates = Candidates.of(torch.arange(4), both.host.vocabulary)
    host_probs = torch.tensor([0.6, 0.3, 0.04, 0.06])
    found = rest_to_host(both, torch.tensor([1.0, 0.0, 0.0]), b" ", host_probs, candidates)
    torch.testing.assert_close(found, torch.tensor([0.0, 0.0, 1.0, 0.0]))


def test_what_a_host_has_ended_is_left_out_by_share() -> None:
    # The host has read "u": "u8" would have been one token, and so would "us".
    host = Strings(Vocabulary((b"u", b"u8", b"us", b"8", b"x", b"se")))
    small = Strings(Vocabulary((b"8", b"x", b"s", b"u", b"u8", b"ux")))
    candidates = Candidates.of(torch.arange(6), host.vocabulary)
    host_probs = torch.tensor([0.1, 0.1, 0.1, 0.1, 0.5, 0.1])
    cut = HostCut.of(host, 0, host_probs, candidates)
    assert [cut.share_of(text) for text in (b"8", b"x", b"8x", b"s")] == [0.0, 1.0, 0.0, 0.0]
    logprobs = torch.tensor([0.2, 0.3, 0.1, 0.2, 0.1, 0.1]).log()
    left = cut.left_of(logprobs, b"u", small).of(logprobs).exp()
    torch.testing.assert_close(left[[4, 5]], torch.tensor([0.0, 0.1]))
    torch.testing.assert_close(cut.left_of(logprobs, b"q", small).of(logprobs), logprobs)


def test_a_token_may_go_on_beyond_one_that_the_host_would_join() -> None:
    # As " re" + "base": " reb" is a token, and yet " rebase" is read as " re", "base".
    vocabulary = Vocabulary((b" re", b" reb", b"base", b"b", b"ase"))
    pieces = {" rebase": [0, 2], " reb": [1], " rease": [0, 4]}
    host = Strings(vocabulary, lambda text: pieces[text])
    candidates = Candidates.of(torch.tensor([2, 4]), vocabulary)
    cut = HostCut.of(host, 0, torch.tensor([0.9, 0.1]), candidates)
    assert cut.following == [b"ase", b"base"]
    assert cut.share_of(b"base") == 1.0 and cut.share_of(b"b") == SHARE_BEYOND


def test_unasked_tokens_keep_the_share_of_those_that_are_asked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("trimtab.align.cut.ASKED_TOKENS", 2)
    host = Strings(Vocabulary((b"u", b"u8", b"x", b"y")))
    small = Strings(Vocabulary((b"8", b"x", b"y")))
    candidates = Candidates.of(torch.arange(4), host.vocabulary)
    cut = HostCut.of(host, 0, torch.full((4,), 0.25), candidates)
    probs = torch.tensor([0.6, 0.2, 0.1])
    left = cut.left_of(probs.log(), b"", small)
    torch.testing.assert_close(left.of(probs.log()).exp(), torch.tensor([0.0, 0.2, 0.1 * 0.25]))
    # All together keep the same share: what is asked, and hence what is not.
    assert left.others == pytest.approx(float(left.of(probs.log()).exp().sum() / probs.sum()))


@pytest.mark.parametrize("without_text", [0.3, 1 - 1e-9])
def test_the_mass_beyond_a_beginning_is_the_sum(without_text: float) -> None:
    strings = Strings(Vocabulary((b"a", None, b"ab", b"abc", b"b", b"ab", None)))
    probs = torch.tensor([0.2, 0.0, 0.3, 0.1, 0.4, 0.0, 0.0]).double() * (1 - without_text)
    probs[1] = without_text
    for start in (b"", b"a", b"ab", b"abc"):
        beyond = float(probs[strings.longer_than(start)].sum())
        expected = -math.inf if not beyond else pytest.approx(math.log(beyond), abs=1e-6)
        assert strings.log_mass_beyond(start, probs.log()) == expected


def test_without_a_tokenizer_the_longest_token_wins() -> None:
    found = Strings(Vocabulary((b"u", b"u8", b"8", b"x", None)))
    assert not found.still_ends(0, b"8") and not found.still_ends(0, b"8x")
    assert found.still_ends(0, b"x") and found.still_ends(1, b"8") and found.still_ends(4, b"8")
    assert found.leaves == frozenset()


def runs_before_words(spaces: int) -> Encode:
    """A tokenizer of letters and runs of spaces, of which a word takes so many as its own."""
    token_bytes = run_vocabulary(spaces).token_bytes

    def encode(text: str) -> list[int]:
        parts = re.findall(rf" {{1,4}}(?= {{{spaces}}}x)| {{{spaces}}}x| {{1,4}}|.|\n", text)
        return [token_bytes.index(part.encode()) for part in parts]

    return encode


def run_vocabulary(spaces: int) -> Vocabulary:
    return Vocabulary(
        (b" ", b"  ", b"   ", b"    ", b"x", b" " * spaces + b"x", b"a", b"\n", b"\t")
    )


def test_a_run_of_spaces_is_one_longer_where_no_word_takes_its_last(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("trimtab.align.follow.FORESEEN_PROB", 2.0)
    takes, leaves = (Strings(run_vocabulary(n), runs_before_words(n)) for n in (0, 1))
    assert leaves.leaves == {b" "} and takes.leaves == frozenset()
    # The small "  " stands before " x" where the host's "   " stands before "x", and conversely.
    probs = torch.tensor([[0.1, 0.6, 0.1, 0.1, 0.05, 0.05, 0.0, 0.0, 0.0]])
    host_probs = torch.tensor([[0.02, 0.03, 0.7, 0.05, 0.1, 0.1, 0.0, 0.0, 0.0]])
    every = torch.arange(9)
    to_taker = Alignment(leaves, takes)
    assert to_taker.other_small(every).tolist() == [-1, 0, 1, 2, -1, -1, -1, -1, -1]
    found = to_taker.to_host(probs, host_probs, every)[0]
    assert float(found[2]) > 0.5 and float(found.sum()) == pytest.approx(1)
    to_leaver = Alignment(takes, leaves)
    assert to_leaver.other_small(every).tolist() == [1, 2, 3, -1, -1, -1, -1, -1, -1]
    host_probs = torch.tensor([[0.7, 0.02, 0.03, 0.05, 0.1, 0.1, 0.0, 0.0, 0.0]])
    found = to_leaver.to_host(probs, host_probs, every)[0]
    assert float(found[0]) > 0.5 and float(found.sum()) == pytest.approx(1)
    assert Alignment(leaves, leaves).other_small(every).tolist() == [-1] * 9
    # The same after a rest: the small "   " before " x" is the host's "   " after " ".
    rest = torch.tensor([0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0])
    host_probs = torch.tensor([0.02, 0.03, 0.7, 0.05, 0.1, 0.1, 0.0, 0.0, 0.0])
    candidates = Candidates.of(every, takes.vocabulary)
    found = rest_to_host(to_taker, rest, b" ", host_probs, candidates)
    assert float(found[1] + found[2]) == pytest.approx(1)
    assert float(found[2]) == pytest.approx(0.7 / 0.73)


def test_equal_vocabularies_carry_a_distribution_unchanged() -> None:
    texts = [b"a", b"ab", None, b"b", b"abc", b"c"]
    probs = distribution(4, 6, seed=1)
    probs[:, 2] = 0
    host = distribution(4, 6, seed=2)
    host[:, 2] = 0
    everything = torch.arange(6)
    probs, host = normalised(probs), normalised(host)
    found = alignment(texts, texts).to_host(probs, host, everything)
    torch.testing.assert_close(found, probs)


def test_a_token_lends_to_the_host_tokens_that_begin_with_it() -> None:
    # "the" and "then" both begin with the small "the"; "t" only with "t"; "x" is foreign to "t".
    small = [b"t", b"the", b"x"]
    host = [b"t", b"then", b"the", b"th", b"x"]
    probs = torch.tensor([[0.2, 0.7, 0.1]])
    host_probs = torch.tensor([[0.1, 0.3, 0.1, 0.1, 0.4]])
    found = alignment(small, host).to_host(probs, host_probs, torch.arange(5))
    oracle = [0.2 * 0.1 / 0.2, 0.7 * 0.3 / 0.4, 0.7 * 0.1 / 0.4, 0.2 * 0.1 / 0.2, 0.1]
    torch.testing.assert_close(found, torch.tensor([oracle]))


def test_a_token_that_is_too_long_lends_to_its_longest_beginning() -> None:
    found = alignment([b"rudder", b"r", b"s"], [b"r", b"rud", b"s"]).to_host(
        torch.tensor([[0.7, 0.1, 0.2]]), torch.tensor([[0.5, 0.2, 0.3]]), torch.arange(3)
    )
    # "rud" continues the small "r", and so does the host's own "r"; "rudder" falls back on "rud".
    oracle = torch.tensor([[0.1 * 5 / 7, 0.1 * 2 / 7 + 0.7, 0.2]])
    torch.testing.assert_close(found, oracle)


def test_what_no_candidate_takes_is_missing_to_one() -> None:
    found = alignment([b"a", b"b", b"c"], [b"c", b"a", b"b"]).to_host(
        torch.tensor([[0.5, 0.3, 0.2]]), torch.tensor([[0.6, 0.3]]), torch.tensor([2, 1])
    )
    torch.testing.assert_close(found, torch.tensor([[0.3, 0.5]]))


def test_tokens_without_text_keep_the_hosts_probability() -> None:
    small = [b"a", b"b", None]
    host = [b"a", b"b", None, b"\x00"]
    probs = torch.tensor([[0.3, 0.1, 0.6], [0.5, 0.5, 0.0]])
    host_probs = torch.tensor([[0.1, 0.4, 0.3, 0.2], [0.0, 0.0, 1.0, 0.0]])
    found = alignment(small, host).to_host(probs, host_probs, torch.arange(4))
    oracle = torch.tensor([[0.5 * 0.75, 0.5 * 0.25, 0.3, 0.2], [0.0, 0.0, 1.0, 0.0]])
    torch.testing.assert_close(found, oracle)


@steady
@given(small=vocabularies, host=vocabularies, seed=st.integers(0, 999))
def test_what_is_carried_is_a_distribution(small: Vocabulary, host: Vocabulary, seed: int) -> None:
    both = Alignment(Strings(small), Strings(host))
    probs = normalised(distribution(2, len(small), seed=seed) + 1e-3)
    host_probs = normalised(distribution(2, len(host), seed=seed + 1) + 1e-3)
    found = both.to_host(probs, host_probs, torch.arange(len(host)))
    assert (found >= 0).all()
    assert (found.sum(-1) <= 1 + 1e-5).all()
    # With one-byte tokens of the whole alphabet on both sides nothing can get lost.
    alphabet = [bytes([b]) for b in b"ab\xfe\xff"]
    full_small = Vocabulary((*small.token_bytes, *alphabet))
    full_host = Vocabulary((*host.token_bytes, *alphabet))
    whole = Alignment(Strings(full_small), Strings(full_host)).to_host(
        normalised(distribution(2, len(full_small), seed=seed) + 1e-3),
        normalised(distribution(2, len(full_host), seed=seed + 1) + 1e-3),
        torch.arange(len(full_host)),
    )
    torch.testing.assert_close(whole.sum(-1), torch.ones(2))


@steady
@given(small=vocabularies, host=vocabularies, seed=st.integers(0, 999))
def test_masses_of_first_tokens_are_the_small_models(
    small: Vocabulary, host: Vocabulary, seed: int
) -> None:
    alphabet = tuple(bytes([b]) for b in b"ab\xfe\xff")
    small, host = (Vocabulary((*v.token_bytes, *alphabet)) for v in (small, host))
    both = Alignment(Strings(small), Strings(host))
    probs = normalised(distribution(1, len(small), seed=seed) + 1e-3)
    host_probs = normalised(distribution(1, len(host), seed=seed + 1) + 1e-3)
    found = both.to_host(probs, host_probs, torch.arange(len(host)))[0]
    texts = [text or b"" for text in host.token_bytes]
    foreign = sum(p for p, t in zip(host_probs[0].tolist(), texts, strict=True) if not t)
    going_on = sum(probs[0, i].item() for i, t in enumerate(small.token_bytes) if t)
    begun = {Strings(small).longest_token(t) for t in texts if t}
    # Those that are no host tokens, and begin some, lend to shorter ones as well.
    both_ways = [
        i for i, t in enumerate(small.token_bytes) if t not in host.ids_by_bytes and i in begun
    ]
    shorter = {Strings(host).longest_token(small.token_bytes[i] or b"") for i in both_ways}
    for token_id in range(len(small)):
        mine = [p for p, t in enumerate(texts) if t and Strings(small).longest_token(t) == token_id]
        if token_id in both_ways or shorter & set(mine):
            continue
        lent_here = [
            i
            for i, text in enumerate(small.token_bytes)
            if text
            and not any(Strings(small).longest_token(t) == i for t in texts if t)
            and Strings(host).longest_token(text) in mine
        ]
        if mine:
            oracle = probs[0, [token_id, *lent_here]].sum() / going_on * (1 - foreign)
            assert float(found[mine].sum()) == pytest.approx(float(oracle), abs=1e-5)


def test_a_rest_is_continued_by_what_follows_it() -> None:
    small = [b"ru", b"rudder", b"run", b"r", b"x", b"rud"]
    host = [b"dder", b"d", b"n", b"ning", b"z"]
    both = alignment(small, host)
    candidates = Candidates.of(torch.arange(5), both.host.vocabulary)
    probs = torch.tensor([0.5, 0.2, 0.1, 0.05, 0.05, 0.1])
    host_probs = torch.tensor([0.3, 0.1, 0.15, 0.05, 0.4])
    found = rest_to_host(both, probs, b"ru", host_probs, candidates)
    # Given "ru" and more: rudder 0.5, run 0.25, rud 0.25; after "ru" "dder" is of "rudder" alone.
    oracle = torch.tensor([0.5, 0.25, 0.25 * 0.75, 0.25 * 0.25, 0.0])
    torch.testing.assert_close(found, oracle)


def test_a_small_model_deals_a_token_out_itself() -> None:
    # Of the host tokens that begin with "App" the small model means that which its next token says.
    small = Strings(Vocabulary((b"App", b"rox", b"ly", b"(", b"Appl", None)))
    host = Strings(Vocabulary((b"App", b"Approx", b"Approximate", b"Apply", b"x")))
    both, candidates = Alignment(small, host), Candidates.of(torch.arange(5), host.vocabulary)
    host_probs = torch.tensor([0.1, 0.3, 0.1, 0.4, 0.1])
    probs = torch.tensor([0.0, 0.6, 0.1, 0.2, 0.0, 0.1])
    found = after_token(both, 0, probs, host_probs, candidates)
    # "ly" is left out: after "App" it would have been read as "Appl", "y". The end is "App" itself.
    oracle = torch.tensor([0.3, 0.6 * 3 / 4, 0.6 / 4, 0.0, 0.0]) / 0.9
    torch.testing.assert_close(found, oracle)
    assert undecided(both, 0, host_probs, candidates) == pytest.approx(1 - 0.3 / 0.5)
    assert undecided(both, 3, host_probs, candidates) == 0.0
    carried = both.to_host(
        torch.tensor([[0.8, 0.0, 0.0, 0.0, 0.2, 0.0]]),
        host_probs[None],
        torch.arange(5),
        [{0: found}],
    )
    # The host's "x" is of no small token.
    expected = 0.9 * (0.8 * oracle + torch.tensor([0.0, 0.0, 0.0, 0.2, 0.0]))
    torch.testing.assert_close(carried[0], expected + torch.tensor([0.0, 0.0, 0.0, 0.0, 0.1]))


@pytest.mark.parametrize("certain", [1.0, 0.6])
def test_what_a_tokenizer_never_writes_is_left_to_the_host(certain: float) -> None:
    # All that the small model says after "App" would have been read as one token with it.
    small = Strings(Vocabulary((b"App", b"l", b"le", b"Appl", b"Apple")))
    host = Strings(Vocabulary((b"App", b"Approx", b"x")))
    candidates = Candidates.of(torch.arange(3), host.vocabulary)
    host_probs = torch.tensor([0.3, 0.1, 0.6])
    probs = torch.tensor([0.0, certain, 1 - certain, 0.0, 0.0])
    found = after_token(Alignment(small, host), 0, probs, host_probs, candidates)
    torch.testing.assert_close(found, torch.tensor([0.75, 0.25, 0.0]))


def test_what_leads_to_no_candidate_is_missing() -> None:
    small = Strings(Vocabulary((b"App", b"rox", b"(", b"x")))
    host = Strings(Vocabulary((b"App", b"Approx", b"Apply", b"x")))
    candidates = Candidates.of(torch.tensor([1, 2, 3]), host.vocabulary)
    probs, host_probs = torch.tensor([0.0, 0.01, 0.99, 0.0]), torch.tensor([0.3, 0.4, 0.3])
    found = after_token(Alignment(small, host), 0, probs, host_probs, candidates)
    # "(" means "App", which is not among the candidates.
    torch.testing.assert_close(found, torch.tensor([0.01, 0.0, 0.0]))


def test_a_longer_candidate_does_not_take_what_the_host_reads_otherwise() -> None:
    small = Strings(Vocabulary((b"App", b"roximate", b"rox", b"ly")))
    host = Strings(Vocabulary((b"App", b"Approx", b"Approximately", b"Apply")))
    candidates = Candidates.of(torch.arange(4), host.vocabulary)
    probs, host_probs = torch.tensor([0.0, 1.0, 0.0, 0.0]), torch.tensor([0.1, 0.6, 0.2, 0.1])
    found = after_token(Alignment(small, host), 0, probs, host_probs, candidates)
    torch.testing.assert_close(found, torch.tensor([0.0, 0.75, 0.25, 0.0]))


def test_blank_lines_before_a_word_are_the_hosts_to_tell_apart(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("trimtab.align.follow.FORESEEN_PROB", 2.0)
    texts = (b"}", b"\n", b"\n\n", b"x", b"a", b" ", b"\t")

    def encode(text: str) -> list[int]:
        return [texts.index(p.encode()) for p in re.findall(r"\n+(?=\nx)|\n+|.", text)]

    small, host = (
        Strings(Vocabulary(texts), encode),
        Strings(Vocabulary((*texts, b"}\n", b"}\n\n"))),
    )
    assert small.leaves == {b"\n"}
    assert small.ways_to_begin(b"}\n\n") == {(0, 1), (0, 2)}
    assert small.ways_to_begin(b"}\n") == {(0, 1)} and small.ways_to_begin(b"}") == {(0,)}
    # "\n" stands before a word for one line's end or for two, "\n\n" for two alone.
    probs = torch.tensor([0.0, 0.9, 0.1, 0.0, 0.0, 0.0, 0.0])
    host_probs = torch.tensor([0.1, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.3, 0.6])
    candidates = Candidates.of(torch.arange(9), host.vocabulary)
    found = after_token(Alignment(small, host), 0, probs, host_probs, candidates)
    torch.testing.assert_close(found, torch.tensor([*7 * [0.0], 0.3, 0.7]))
    # A run by itself likewise: "\n" and once more "\n" is the host's "\n\n" before a word.
    probs = torch.tensor([0.0, 0.9, 0.0, 0.1, 0.0, 0.0, 0.0])
    host_probs = torch.tensor([0.0, 0.3, 0.6, 0.1, 0.0, 0.0, 0.0, 0.0, 0.0])
    found = after_token(Alignment(small, host), 1, probs, host_probs, candidates)
    torch.testing.assert_close(found, torch.tensor([0.0, 0.1, 0.9, *6 * [0.0]]))


def test_a_host_that_sees_more_coming_is_heard() -> None:
    # The small tokenizer reads "jun" as one token, unless "k" follows; the host reads "hern" as one
    # token, unless "ie" follows.
    texts = (b"j", b"unk", b"jun", b"k", b"hern", b"ie", b"t", None)
    small_texts = [text.decode() for text in texts if text]
    host_texts = (b"j", b"jun", b"kt", b"junk", b"her", b"hern", b"nie", b"n", b"nk")

    def read(text: str) -> list[int]:
        return [small_texts.index(p) for p in re.findall(r"j(?=unk)|unk|jun|hern|ie|.", text)]

    def read_by_host(text: str) -> list[int]:
        parts = re.findall(r"jun(?=kt)|her(?=nie)|kt|junk|jun|hern|nie|nk|.", text)
        return [host_texts.index(part.encode()) for part in parts]

    def encode_or_nothing(text: str) -> list[int]:
        try:
            return read(text)
        except ValueError:
            return []

    small = Strings(Vocabulary(texts), encode_or_nothing)
    host = Strings(Vocabulary(host_texts), read_by_host)
    both, candidates = Alignment(small, host), Candidates.of(torch.arange(9), host.vocabulary)
    assert both.may_read_otherwise and not Alignment(host, host).may_read_otherwise
    assert both.first_small(torch.tensor([1])).tolist() == [2]

    def expected(**probs: float) -> Tensor:
        return torch.tensor([probs.get(text.decode(), 0.0) for text in host_texts])

    expects = expected(j=0.05, jun=0.9, junk=0.05)
    assert undecided(both, 0, expects, candidates) == pytest.approx(1 - 0.05 / (0.1 + 0.045))
    found = after_token(both, 0, torch.eye(8)[1], expects, candidates)
    # "junk" is what the tokenizers lead to; "jun" and "j" count one in twenty of what they have.
    oracle = expected(j=0.05 / 20, jun=0.9 / 20, junk=0.05)
    torch.testing.assert_close(found, oracle / oracle.sum())
    # However sure a host is, half is left to what it thinks possible; where that is nothing, none.
    found = after_token(both, 0, torch.eye(8)[1], expected(jun=0.99, junk=1e-5), candidates)
    torch.testing.assert_close(found, expected(jun=0.5, junk=0.5))
    found = after_token(both, 0, torch.eye(8)[1], expected(jun=1.0), candidates)
    torch.testing.assert_close(found, expected(jun=1.0))
    # After the end of a text nothing comes.
    found = after_token(both, 0, torch.eye(8)[7], expects, candidates)
    torch.testing.assert_close(found, expected(j=1.0))
    assert undecided(both, 7, expects, candidates) == 0.0
    # Asked what follows "hern", the small model says "ie", and the host reads "hernie" as "her".
    expects = expected(her=0.98, hern=1e-4)
    assert undecided(both, 4, expects, candidates) > 0.99
    found = after_token(both, 4, torch.eye(8)[5], expects, candidates)
    assert float(found[host_texts.index(b"her")]) == pytest.approx(1.0)
    # After "ju" the small "jun" means the host's "n", but a host that is sure of "nk" is heard.
    expects = expected(n=0.05, nk=0.9, t=0.05)
    found = rest_to_host(both, torch.eye(8)[2], b"ju", expects, candidates)
    torch.testing.assert_close(found, expected(n=0.05, nk=0.045) / 0.095)


def test_what_is_not_followed_goes_to_the_token_with_which_the_host_begins() -> None:
    small = Strings(Vocabulary((b"unreal", b"x", b"y")))
    host = Strings(Vocabulary((b"un", b"real", b"x")))
    both, candidates = Alignment(small, host), Candidates.of(torch.arange(3), host.vocabulary)
    probs, host_probs = torch.tensor([0.0, 0.4, 0.0]), torch.tensor([0.2, 0.1, 0.7])
    found = after_token(both, 0, probs, host_probs, candidates)
    torch.testing.assert_close(found, torch.tensor([1.0, 0.0, 0.0]))


def test_what_is_not_followed_is_dealt_out_as_the_host_sees_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("trimtab.align.follow.FOLLOWED_TOKENS", 1)
    small = Strings(Vocabulary((b"a", b"b", b"c")))
    host = Strings(Vocabulary((b"a", b"ab", b"ac")))
    both, candidates = Alignment(small, host), Candidates.of(torch.arange(3), host.vocabulary)
    host_probs, probs = torch.tensor([0.5, 0.2, 0.3]), torch.tensor([0.1, 0.7, 0.2])
    found = after_token(both, 0, probs, host_probs, candidates)
    torch.testing.assert_close(found, torch.tensor([0.15, 0.7 + 0.06, 0.09]))


def test_after_a_rest_the_end_of_a_text_is_the_hosts() -> None:
    both = alignment([b"rud", b"run"], [b"d", b"n", None])
    candidates = Candidates.of(torch.arange(3), both.host.vocabulary)
    host_probs = torch.tensor([0.1, 0.1, 0.8])
    found = rest_to_host(both, torch.tensor([0.6, 0.4]), b"ru", host_probs, candidates)
    torch.testing.assert_close(found, torch.tensor([0.6 * 0.2, 0.4 * 0.2, 0.8]))


def test_a_rest_that_cannot_go_on_leaves_the_host_as_it_is() -> None:
    both = alignment([b"a", b"b"], [b"c", b"d"])
    candidates = Candidates.of(torch.arange(2), both.host.vocabulary)
    host_probs = torch.tensor([0.4, 0.6])
    probs = torch.tensor([0.5, 0.5])
    assert torch.equal(rest_to_host(both, probs, b"q", host_probs, candidates), host_probs)
    assert torch.equal(rest_to_host(both, probs, b"", host_probs, candidates), host_probs)
    special = alignment([b"ab", b"a"], [None])
    nothing = Candidates.of(torch.tensor([0]), special.host.vocabulary)
    found = rest_to_host(special, probs, b"a", torch.tensor([1.0]), nothing)
    torch.testing.assert_close(found, torch.tensor([1.0]))


@cache
def small_model() -> HFModel:
    return open_model("tiny:llama?vocab=bpe", dtype="float32")


def covers(context: bytes) -> list[Cover]:
    model = small_model()
    return covers_of(context, model.encode, model.vocabulary)


def spelled(cover: Cover) -> bytes:
    token_bytes = small_model().vocabulary.token_bytes
    return b"".join(token_bytes[t] or b"" for t in cover.tokens) + cover.rest


contexts = st.builds(
    lambda text, cut: text.encode()[: max(len(text.encode()) - cut, 0)],
    st.text(st.sampled_from("the rudder  \n\tturns, é€😀"), max_size=24),
    st.integers(0, 3),
)


@steady
@given(context=contexts)
def test_every_cover_spells_the_context(context: bytes) -> None:
    found = covers(context)
    assert [spelled(cover) for cover in found] == [context] * len(found)
    assert len(set(found)) == len(found)
    readable = context.decode("utf-8", "ignore")
    assert found[0].tokens == tuple(small_model().encode(readable))
    assert len(found) >= min(MAX_BACK, len(found[0].tokens)) + 1
    assert covers(context) == found


@steady
@given(context=contexts, ahead=st.text(max_size=4))
def test_covers_do_not_depend_on_what_follows(context: bytes, ahead: str) -> None:
    whole = context + ahead.encode()
    assert covers(whole[: len(context)]) == covers(context)


def test_covers_by_hand() -> None:
    model = small_model()
    rudder = tuple(model.encode("the rudder"))
    found = covers(b"the rudder")
    last = model.vocabulary.token_bytes[rudder[-1]] or b""
    assert found[:2] == [Cover(rudder, b""), Cover(rudder[:-1], last)]
    assert covers(b"") == [Cover((), b"")]


def test_a_run_of_spaces_may_leave_its_last_to_a_word() -> None:
    found = covers(b"def f():\n    ")
    before_word = tuple(small_model().encode("def f():\n    return"))
    reached = [c for c in found if c.rest == b" " and before_word[: len(c.tokens)] == c.tokens]
    assert len(reached) == 1


def test_a_cut_character_is_left_to_the_next_token_or_read_as_bytes() -> None:
    vocabulary = Vocabulary((b"5", b" ", b"\xe2", b"\x82", b"\xe2\x82", b"\xe2\x82\xac"))

    def encode(text: str) -> list[int]:
        return [vocabulary.ids_by_bytes[letter.encode()] for letter in text]

    found = covers_of(b"5 \xe2\x82", encode, vocabulary)
    oracle = [
        Cover((0, 1), b"\xe2\x82"),
        Cover((0,), b" \xe2\x82"),
        Cover((), b"5 \xe2\x82"),
        Cover((0, 1, 2), b"\x82"),
        Cover((0, 1, 2, 3), b""),
        Cover((0, 1, 4), b""),
    ]
    assert found == oracle
    whole = tuple(small_model().encode("5 €"))
    assert Cover(whole[:-1], b"") in covers("5 €".encode()[:-1])


@pytest.mark.parametrize(
    ("context", "readable"),
    [
        ("€uro".encode()[1:], b"uro"),
        ("😀 smile".encode()[2:], b" smile"),
        (b"slip \xff\xfe here", b"slip  here"),
        (b"slip \xc3(", b"slip ("),
        (b"\xbf", b""),
    ],
)
def test_bytes_that_are_no_text_are_passed_over(context: bytes, readable: bytes) -> None:
    assert {spelled(cover) for cover in covers(context)} == {readable}


def test_a_tokenizers_own_space_does_not_shift_the_rest() -> None:
    # As SentencePiece does it: a space before the text, which the text does not have.
    token_bytes = [b" ab", b" ", b"  ", b"x", b" x", b"c"]

    def encode(text: str) -> list[int]:
        rest, ids = (" " + text).encode(), []
        while rest:
            ids.append(max((len(t), i) for i, t in enumerate(token_bytes) if rest.startswith(t))[1])
            rest = rest[len(token_bytes[ids[-1]]) :]
        return ids

    found = covers_of(b"ab ", encode, Vocabulary(tuple(token_bytes)))
    assert Cover((0,), b" ") in found
    assert {b"".join(token_bytes[t] for t in c.tokens) + c.rest for c in found} == {b" ab "}


@pytest.mark.parametrize("spread", [0.1, 3.0, 40.0])
@pytest.mark.parametrize("start", [b"", b"a"])
def test_the_likeliest_beyond_a_beginning(start: bytes, spread: float) -> None:
    texts = [None, *(bytes([97 + n % 3, 97 + n % 5, n]) for n in range(200)), b"a", None]
    strings = Strings(Vocabulary(tuple(texts)))
    logprobs = (spread * torch.randn(len(texts), generator=torch.manual_seed(1))).log_softmax(0)
    among = [n for n, text in enumerate(texts) if text and text.startswith(start) and text != start]
    wanted = sorted(among, key=lambda n: -float(logprobs[n]))[:20]
    assert strings.likeliest_beyond(start, logprobs, 20).tolist() == wanted
