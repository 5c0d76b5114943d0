"""What is carried to a host's tokens, against all token sequences of a toy model counted out.

The oracle is that of Phan et al. 2024 ("Exact Byte-Level Probabilities from Tokenized Language
Models") and Vieira et al. 2024: the probability that a stream of bytes begins with a string is the
sum over the token sequences that cover it. A host that reads the longest token first takes the
token h where the stream begins with h and with no longer token, so that its tokens part all
streams among them, and a distribution over its tokens is defined.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from trimtab.align.candidates import Candidates
from trimtab.align.carry import Alignment
from trimtab.align.covers import Cover, covers_of
from trimtab.align.cut import HostCut
from trimtab.align.follow import FOLLOWED_SHARE
from trimtab.align.ignored import most_ignored
from trimtab.align.replies import carry_replies, deal_out, still_undecided
from trimtab.align.strings import Strings
from trimtab.backends.token_tree import TokenTree
from trimtab.backends.ways import MIN_SHARE, Ways
from trimtab.vocab import Vocabulary

BEGIN, END = 0, 1
"""Ids of the two tokens of every toy that stand for no text."""


def longest_of(texts: Sequence[bytes | None], stream: bytes) -> int:
    """The longest token that begins a stream; -1 for none."""
    begin = [i for i, text in enumerate(texts) if text and stream.startswith(text)]
    return max(begin, key=lambda i: len(texts[i] or b""), default=-1)


@dataclass(frozen=True)
class Toy:
    """A model of a few byte strings, which its tokenizer reads from the left, the longest first.

    Attributes:
        texts: Bytes of each token; the first two stand for none.
        table: Probabilities of the next token by the last two, shape [vocab, vocab, vocab].
    """

    texts: tuple[bytes | None, ...]
    table: Tensor

    @property
    def vocabulary(self) -> Vocabulary:
        return Vocabulary(self.texts, bos_id=BEGIN, eos_id=END)

    def encode(self, text: str) -> list[int]:
        rest, ids = text.encode(), list[int]()
        while rest:
            # What it cannot write is left out.
            found = longest_of(self.texts, rest)
            ids += [found] if found >= 0 else []
            rest = rest[len(self.texts[found] or b"") if found >= 0 else 1 :]
        return ids

    def probs(self, tokens: Sequence[int]) -> Tensor:
        """Of the token after some others, shape [vocab]."""
        before, last = (BEGIN, BEGIN, *tokens)[-2:]
        return self.table[before, last]

    def streams(self, cover: Cover, context: bytes, size: int) -> dict[bytes, float]:
        """What follows one way of reading a context, by its probability.

        The first `size` bytes; fewer where the text ends. Streams of nothing are left out.
        """
        found, start = defaultdict[bytes, float](float), len(context)
        read = len(context) - len(cover.rest)

        def follow(tokens: tuple[int, ...], text: bytes, prob: float) -> None:
            if len(text) >= start + size:
                found[text[start : start + size]] += prob
                return
            for token_id, share in enumerate(self.probs(tokens).tolist()):
                piece = self.texts[token_id]
                if share > 0 and piece:
                    longer = text + piece
                    if len(longer) > start and longer.startswith(context):
                        follow((*tokens, token_id), longer, prob * share)
                elif share > 0 and len(text) > start:
                    found[text[start:]] += prob * share

        if prob := self.prob_of(cover.tokens):
            follow(cover.tokens, context[:read], prob)
        return found

    def prob_of(self, tokens: Sequence[int]) -> float:
        """The probability of a beginning."""
        return prod(float(self.probs(tokens[:i])[token]) for i, token in enumerate(tokens))

    def ways_to_read(self, context: bytes) -> Iterator[Cover]:
        """All ways to read a context, whatever the tokenizer would do."""

        def follow(tokens: tuple[int, ...], rest: bytes) -> Iterator[Cover]:
            yield Cover(tokens, rest)
            for token_id, piece in enumerate(self.texts):
                if piece and rest.startswith(piece):
                    yield from follow((*tokens, token_id), rest[len(piece) :])

        return follow((), context)


def toy(texts: Sequence[bytes], seed: int, *, is_canonical: bool = True, end: float = 0.1) -> Toy:
    """A model at random.

    Args:
        texts: Its tokens.
        seed: Of its probabilities.
        is_canonical: It gives nothing to what its tokenizer never writes.
        end: How likely a text ends, more or less.
    """
    of_all = (None, None, *texts)
    made = torch.Generator().manual_seed(seed)
    table = torch.rand(len(of_all), len(of_all), len(of_all), generator=made).double() ** 2
    table[..., BEGIN] = 0.0
    table[..., END] *= end
    if is_canonical:
        pieces = [text or b"" for text in of_all]
        for before, first in enumerate(pieces):
            for last, second in enumerate(pieces):
                for new, third in enumerate(pieces[2:], start=2):
                    if _joins(pieces, (first, second, third)):
                        table[before, last, new] = 0.0
    # A place with no way on is an end.
    table[..., END] += (table.sum(-1) == 0).double()
    return Toy(of_all, table / table.sum(-1, keepdim=True))


def _joins(texts: Sequence[bytes], run: Sequence[bytes]) -> bool:
    """Whether a tokenizer would read one of three pieces as a longer token with what follows."""
    return any(
        piece and len(texts[longest_of(texts, b"".join(run[place:]))]) > len(piece)
        for place, piece in enumerate(run)
    )


def exactly(
    small: Toy, host: Strings, context: bytes, covers: Sequence[Cover], last: bytes = b""
) -> Tensor:
    """The oracle: which token a host that reads the longest first takes next, shape [vocab].

    Args:
        small: The model.
        host: The host.
        context: The bytes so far.
        covers: The ways to read it that count.
        last: The host's last token; what would have made it a longer one does not follow.
    """
    texts, probs = host.vocabulary.token_bytes, torch.zeros(len(host.vocabulary)).double()
    for cover in covers:
        for stream, prob in small.streams(cover, context, host.longest).items():
            if not last or len(texts[longest_of(texts, last + stream)] or b"") == len(last):
                probs[longest_of(texts, stream)] += prob
    return probs / probs.sum()


def carried(
    small: Toy,
    host: Strings,
    context: bytes,
    host_probs: Tensor,
    *,
    last: bytes = b"",
    covers: Sequence[Cover] = (),
) -> Tensor:
    """What the package makes of it, put together as `Live` does it, shape [vocab of host].

    Args:
        small: The model.
        host: The host.
        context: The bytes so far.
        host_probs: The host's own, shape [vocab of host].
        last: The host's last token, if it counts.
        covers: The ways to read the context (default: those of the package, and those that begin
            a token inside the last one).
    """
    strings = Strings(small.vocabulary, small.encode)
    alignment = Alignment(strings, host)
    candidates = Candidates.of(torch.arange(len(host.vocabulary)), host.vocabulary)
    goes_inside = not covers
    covers = covers or covers_of(context, small.encode, small.vocabulary)
    tree = TokenTree()
    ends = [tree.add((BEGIN, *cover.tokens)) for cover in covers]
    last_id = host.vocabulary.ids_by_bytes[last] if last else None
    cut = None if last_id is None else HostCut.of(host, last_id, host_probs, candidates)
    ways = Ways.of(tree, covers, ends, cut)

    def after(node: int, *tokens: int) -> Tensor:
        return small.probs([*(tree.tokens[n] for n in tree.line(node)), *tokens])

    nodes = sorted(ways.nodes)
    logprobs = torch.stack([after(node) for node in nodes]).log()
    place = {node: number for number, node in enumerate(nodes)}
    inside = [
        (one, after(one.node, one.token_id).log())
        for one in (ways.inside(0, logprobs, place, strings) if goes_inside else ())
    ]
    replies = [ways.replies(logprobs, place, strings, inside)]
    own = host_probs[None]
    asked = still_undecided(alignment, replies, own, candidates)
    said = [after(one.node, one.token_id) for one in asked]
    told = deal_out(alignment, asked, said, own, candidates)
    return carry_replies(alignment, replies, told, own, candidates)[0]


steady = settings(deadline=None, derandomize=True, max_examples=15)
seeds = st.integers(0, 999)
contexts = st.text(st.sampled_from("abc"), max_size=5).map(str.encode)
BYTES = (b"a", b"b", b"c")
NO_LIMITS = {
    "follow.FOLLOWED_SHARE": 0.0,
    "follow.FOLLOWED_TOKENS": 1_000,
    "follow.FORESEEN_PROB": 2.0,
    "replies.MAX_ASKED": 1_000,
    "replies.MIN_UNDECIDED": 1e-12,
}


def words(most: int, count: int, *, letters: bytes = b"abc") -> st.SearchStrategy[list[bytes]]:
    """All letters and some longer tokens."""
    word = st.lists(st.sampled_from(letters), min_size=2, max_size=most).map(bytes)
    singles = [bytes([letter]) for letter in letters]
    return st.lists(word, max_size=count, unique=True).map(lambda longer: [*singles, *longer])


@contextmanager
def without_limits() -> Iterator[None]:
    """Every token is followed and asked about, and every cover counts."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in NO_LIMITS.items():
            patch.setattr(f"trimtab.align.{name}", value)
        patch.setattr("trimtab.backends.ways.MIN_SHARE", 0.0)
        patch.setattr("trimtab.backends.ways.MIN_INSIDE", 1e-30)
        yield


def with_inside(covers: list[Cover], small: Toy) -> list[Cover]:
    """Covers, and those of which a token begins inside the last one of the first."""
    *before, last = covers[0].tokens or (END,)
    text, ids = small.texts[last] or b"", small.vocabulary.ids_by_bytes
    inside = [(text[:size], text[size:]) for size in range(1, len(text))]
    found = [Cover((*before, ids[one]), rest) for one, rest in inside if one in ids]
    return [*covers, *(cover for cover in found if cover not in covers)]


def host_of(texts: Sequence[bytes], *, has_end: bool = False) -> Strings:
    return Strings(Vocabulary((*([None] if has_end else []), *texts)))


def own_view(host: Strings, seed: int) -> Tensor:
    """What a host thinks at random, over all its tokens."""
    made = torch.Generator().manual_seed(seed + 1_000)
    weights = torch.rand(len(host.vocabulary), generator=made).double() ** 2 + 1e-3
    return weights / weights.sum()


def distance(one: Tensor, other: Tensor) -> float:
    """In total variation."""
    return float((one - other).abs().sum()) / 2


def share_going_on(small: Toy, context: bytes, covers: Iterator[Cover] | Sequence[Cover]) -> float:
    """The probability of some ways to read a context, with more after it."""
    return sum(sum(small.streams(cover, context, 1).values()) for cover in covers)


@steady
@given(texts=words(3, 5), context=contexts, seed=seeds)
def test_bytes_are_told_exactly(texts: list[bytes], context: bytes, seed: int) -> None:
    """All ways to read the context count, and the host's own view does not, but for its end."""
    small, host = toy(texts, seed), host_of(BYTES, has_end=True)
    covers = list(small.ways_to_read(context))
    assume(share_going_on(small, context, covers) > 0)
    host_probs, oracle = own_view(host, seed), exactly(small, host, context, covers)
    with without_limits():
        found = carried(small, host, context, host_probs)
    expected = (1 - host_probs[0]) * oracle
    expected[0] = host_probs[0]
    assert distance(found, expected) < 1e-5
    # With the limits no more is lost than they say.
    most = MIN_SHARE * len(covers) + FOLLOWED_SHARE * len(texts)
    assert distance(carried(small, host, context, host_probs), expected) < most


def test_a_host_of_bytes_in_figures() -> None:
    # After "a" the model has read "a" and goes on, or its next token is "ab".
    small = toy([*BYTES, b"ab"], 5)
    host = host_of(BYTES)
    found = carried(small, host, b"a", own_view(host, 5))
    first, after = small.probs([]), small.probs([2])
    oracle = first[2] * after[[2, 3, 4]] + torch.tensor([0.0, 1.0, 0.0]) * first[5]
    oracle[0] += first[2] * after[5]
    torch.testing.assert_close(found, oracle / oracle.sum(), atol=1e-6, rtol=0)


@steady
@given(texts=words(3, 5), context=contexts, seed=seeds)
def test_ways_that_are_left_out_bound_the_error(
    texts: list[bytes], context: bytes, seed: int
) -> None:
    """A model may well give something to what its tokenizer never writes."""
    small, host = toy(texts, seed, is_canonical=False), host_of(BYTES)
    every = list(small.ways_to_read(context))
    taken = with_inside(covers_of(context, small.encode, small.vocabulary), small)
    left_out = 1 - share_going_on(small, context, taken) / share_going_on(small, context, every)
    with without_limits():
        found = carried(small, host, context, own_view(host, seed))
    assert distance(found, exactly(small, host, context, taken)) < 1e-5
    assert distance(found, exactly(small, host, context, every)) < left_out + 1e-5


def test_covers_do_not_go_into_the_last_token() -> None:
    # A tokenizer that reads "tank" as "t", "ank", and what is written of it so far as "tan".
    vocabulary = Vocabulary((b"t", b"ank", b"tan"))
    found = covers_of(b"tan", {"tan": [2]}.__getitem__, vocabulary)
    assert found == [Cover((2,), b""), Cover((), b"tan")]


@steady
@given(texts=words(2, 4), context=contexts, seed=seeds)
def test_one_tokenizer_gives_the_models_own(texts: list[bytes], context: bytes, seed: int) -> None:
    """Given the host's last token, no other way to read the context is left."""
    small = toy(texts, seed)
    own = tuple(small.encode(context.decode()))
    probs = small.probs(own) * (torch.arange(len(small.texts)) > END)
    assume(small.prob_of(own) > 0 and float(probs.sum()) > 0)
    host = Strings(small.vocabulary, small.encode)
    host_probs = own_view(host, seed) * (torch.arange(len(small.texts)) > END)
    last = (small.texts[own[-1]] or b"") if own else b""
    found = carried(small, host, context, host_probs, last=last)
    torch.testing.assert_close(found, probs / probs.sum(), atol=1e-6, rtol=0)


@steady
@given(texts=words(5, 5), context=contexts, seed=seeds)
def test_one_way_and_one_tokenizer_give_the_models_own(
    texts: list[bytes], context: bytes, seed: int
) -> None:
    small = toy(texts, seed, is_canonical=False)
    own = tuple(small.encode(context.decode()))
    probs = small.probs(own) * (torch.arange(len(small.texts)) > END)
    host = Strings(small.vocabulary, small.encode)
    host_probs = own_view(host, seed) * (torch.arange(len(small.texts)) > END)
    # What may only be dealt out among tokens that begin alike is its own here.
    found = carried(small, host, context, host_probs, covers=[Cover(own, b"")])
    torch.testing.assert_close(found, probs / probs.sum(), atol=1e-6, rtol=0)


@steady
@given(texts=words(2, 4), context=contexts, seed=seeds, counts=st.booleans())
def test_a_model_of_bytes_tells_pairs_apart(
    texts: list[bytes], context: bytes, seed: int, counts: bool
) -> None:
    small, host = toy(BYTES, seed), host_of(texts)
    covers = covers_of(context, small.encode, small.vocabulary)
    last = context[-1:] if counts else b""
    oracle = exactly(small, host, context, covers, last)
    # A byte that would be joined with any other ends no text.
    assume(not oracle.isnan().any())
    with without_limits():
        found = carried(small, host, context, own_view(host, seed), last=last)
    assert distance(found, oracle) < 1e-5


@steady
@given(pairs=words(2, 4), data=st.data(), seed=seeds)
def test_a_token_that_the_host_lacks_is_told_apart(
    pairs: list[bytes], data: st.DataObject, seed: int
) -> None:
    """The host has "abc", and may lack "ab", with which the small model begins it."""
    small = toy(pairs, seed)
    longer = [pair + last for pair in pairs[len(BYTES) :] for last in BYTES]
    some = data.draw(st.lists(st.sampled_from(longer), unique=True)) if longer else []
    kept = [pair for pair in pairs[len(BYTES) :] if data.draw(st.booleans())]
    host = host_of([*BYTES, *kept, *some])
    oracle = exactly(small, host, b"", [Cover((), b"")])
    with without_limits():
        found = carried(small, host, b"", own_view(host, seed))
    assert distance(found, oracle) < 1e-5


def prefix_code(seed: int) -> list[bytes]:
    """Strings of at most three letters of which every long text begins with one, and only one."""
    made, leaves = torch.Generator().manual_seed(seed), list[bytes]()
    inner = [b""]
    while inner:
        text = inner.pop()
        for letter in BYTES:
            grows = len(text) < 2 and float(torch.rand(1, generator=made)) < 0.4
            (inner if grows else leaves).append(text + letter)
    return leaves


@steady
@given(texts=words(3, 5), context=contexts, seed=seeds)
def test_a_prefix_free_cover_sums_to_one(texts: list[bytes], context: bytes, seed: int) -> None:
    small, host = toy(texts, seed, is_canonical=False, end=0.0), host_of(prefix_code(seed))
    found = carried(small, host, context, own_view(host, seed))
    assert (found >= 0).all()
    assert float(found.sum()) == pytest.approx(1, abs=1e-5)


@steady
@given(
    texts=words(3, 5), context=contexts, ahead=st.text("abc", min_size=1, max_size=3), seed=seeds
)
def test_steps_multiply_to_the_probability_of_the_whole(
    texts: list[bytes], context: bytes, ahead: str, seed: int
) -> None:
    """P(x and then y) = P(x) P(y after x), from one context to the next, each read anew."""
    small, host, string = toy(texts, seed, end=0.0), host_of(BYTES), ahead.encode()
    ways = list(small.ways_to_read(context))
    streams = defaultdict[bytes, float](float)
    for way in ways:
        for text, prob in small.streams(way, context, len(string)).items():
            streams[text] += prob
    # Where the tokenizer's own rules leave no way on, a text ends all the same.
    assume(streams[string] > 1e-6 and all(len(text) == len(string) for text in streams))
    oracle = streams[string] / sum(streams.values())
    with without_limits():
        steps = [
            carried(small, host, context + string[:place], own_view(host, seed))
            for place in range(len(string))
        ]
    found = prod(float(step[string[place] - ord("a")]) for place, step in enumerate(steps))
    assert found == pytest.approx(oracle, rel=1e-4, abs=1e-8)


@steady
@given(seed=seeds, context=contexts)
def test_a_token_of_two_bytes_is_as_likely_as_its_bytes(seed: int, context: bytes) -> None:
    """Two hosts agree, one of which takes in one step what the other takes in two."""
    small, pairs = toy(BYTES, seed, end=0.0), [first + last for first in BYTES for last in BYTES]
    one, two = host_of(pairs), host_of(BYTES)
    with without_limits():
        found = carried(small, one, context, own_view(one, seed))
        first = carried(small, two, context, own_view(two, seed))
        after = [carried(small, two, context + text, own_view(two, seed)) for text in BYTES]
    torch.testing.assert_close(found, (first[:, None] * torch.stack(after)).flatten())


CASES = {
    "characters": ("aé€", ["é".encode(), "aé".encode(), "€".encode()[:2], "€".encode()[1:]]),
    "leading spaces": ("ax \n\t", [b" a", b" x", b"  ", b"   ", b"\n ", b"ax"]),
    "digits": ("12ax \n\t", [b"12", b"121", b" 1", b"22", b"a1"]),
}


@pytest.mark.parametrize("case", CASES)
@settings(steady, max_examples=6)
@given(data=st.data(), seed=seeds)
def test_characters_spaces_and_digits_are_told_exactly(
    case: str, data: st.DataObject, seed: int
) -> None:
    """The context may end inside a character, and its tokens inside a number or a run of spaces."""
    letters, longer = CASES[case]
    singles = sorted({bytes([byte]) for byte in letters.encode()})
    small, host = toy([*singles, *longer], seed), host_of(singles)
    text = data.draw(st.text(letters, max_size=3)).encode()
    context = text[: data.draw(st.integers(0, len(text)))]
    covers = list(small.ways_to_read(context))
    assume(share_going_on(small, context, covers) > 0)
    with without_limits():
        found = carried(small, host, context, own_view(host, seed))
    assert distance(found, exactly(small, host, context, covers)) < 1e-5


def test_what_the_small_model_cannot_write_keeps_the_hosts_probability() -> None:
    """The end of a text, and an added token where the next token repeats nothing."""
    small = toy([*BYTES, b"ab"], 1)
    host = host_of([*BYTES, b"<tool>"], has_end=True)
    host_probs = own_view(host, 1)
    for context in (b"", b"a", b"ca"):
        found = carried(small, host, context, host_probs)
        kept = [0] if context else [0, 4]
        torch.testing.assert_close(found[kept], host_probs[kept], atol=1e-6, rtol=0)
        assert float(found.sum()) == pytest.approx(1, abs=1e-5)


def test_a_token_that_the_host_lacks_goes_both_ways() -> None:
    # The small "ab" is the host's "abc", or its "a" with more.
    both = Alignment(host_of([b"ab", b"a", b"c"]), host_of([b"a", b"abc", b"c"]))
    probs = torch.tensor([[0.5, 0.2, 0.3]])

    def found(*host_probs: float) -> Tensor:
        return both.to_host(probs, torch.tensor([host_probs]), torch.arange(3))[0]

    torch.testing.assert_close(found(0.3, 0.1, 0.6), torch.tensor([0.575, 0.125, 0.3]))
    torch.testing.assert_close(found(0.8, 0.1, 0.1), torch.tensor([0.6, 0.1, 0.3]))
    # Where the host never begins it so, or is as sure of the longer, all is of that.
    torch.testing.assert_close(found(0.0, 0.1, 0.9), torch.tensor([0.2, 0.5, 0.3]))
    torch.testing.assert_close(found(0.1, 0.6, 0.3), torch.tensor([0.2, 0.5, 0.3]))


@steady
@given(texts=words(3, 5), others=words(3, 5), inside=st.sets(st.integers(0, 9)), seed=seeds)
def test_what_is_ignored_has_a_bound(
    texts: list[bytes], others: list[bytes], inside: set[int], seed: int
) -> None:
    small, host = toy(texts, seed), host_of([*others, b"<tool>"], has_end=True)
    every = torch.arange(len(host.vocabulary))
    token_ids = every[[token_id in inside for token_id in every.tolist()]]
    both = Alignment(Strings(small.vocabulary, small.encode), host)
    probs, host_probs = small.probs([2])[None], own_view(host, seed)[None]
    assume(float(probs[0, END]) < 1)
    most = float(most_ignored(both, probs, host_probs, token_ids)[0])
    whole = both.to_host(probs, host_probs, every)[0]
    some = torch.zeros_like(whole)
    some[token_ids] = both.to_host(probs, host_probs[:, token_ids], token_ids)[0]
    missing = abs(float(whole.sum() - some.sum())) / 2
    assert distance(whole, some) + missing <= most + 1e-6
    assert float(most_ignored(both, probs, host_probs, every)[0]) == pytest.approx(0, abs=1e-6)
