"""Two tokenizers that merge pairs, and a language of a few words of which all is known.

What follows changes how such tokenizers cut, as it does with real ones: what is carried is compared
with what a host would know that had read the same language.
"""

import random
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import pairwise
from statistics import fmean

import pytest
import torch
from torch import Tensor

from tests.test_align_oracle import distance
from trimtab.align.candidates import Candidates
from trimtab.align.carry import Alignment
from trimtab.align.covers import covers_of
from trimtab.align.cut import HostCut
from trimtab.align.replies import carry_replies, deal_out, still_undecided
from trimtab.align.strings import Strings
from trimtab.backends.token_tree import TokenTree
from trimtab.backends.ways import Ways
from trimtab.vocab import Vocabulary

LETTERS = "abcd"


@dataclass(frozen=True)
class Merges:
    """A tokenizer that joins pairs of letters and tokens, in the order in which it learnt them.

    One more token, the last, stands before every text.
    """

    pairs: tuple[tuple[str, str], ...]

    @cached_property
    def texts(self) -> tuple[bytes, ...]:
        joined = dict.fromkeys("".join(pair) for pair in self.pairs)
        return tuple(text.encode() for text in (*LETTERS, *joined))

    @cached_property
    def encode(self) -> Callable[[str], list[int]]:
        # A language has few words and beginnings of them.
        known = lru_cache(None)(self._encode)
        return lambda text: list(known(text))

    def _encode(self, text: str) -> tuple[int, ...]:
        parts = list(text)
        for pair in self.pairs:
            place = 0
            while place < len(parts) - 1:
                if (parts[place], parts[place + 1]) == pair:
                    parts[place : place + 2] = ["".join(pair)]
                place += 1
        return tuple(self.texts.index(part.encode()) for part in parts)

    @property
    def strings(self) -> Strings:
        return Strings(Vocabulary((*self.texts, None)), self.encode)


def merges(made: random.Random, words: Sequence[str]) -> Merges:
    """Pairs at random, of those that stand in the words."""
    pairs = list[tuple[str, str]]()
    while len(pairs) < 12:
        tokenizer = Merges(tuple(pairs))
        word = [tokenizer.texts[i].decode() for i in tokenizer.encode(made.choice(words))]
        if len(word) > 1:
            pairs.append(made.choice(list(pairwise(word))))
    return Merges(tuple(pairs))


def language(made: random.Random) -> dict[str, float]:
    """Words of one length, so that none is another's beginning, and how likely each is."""
    words = {"".join(made.choices(LETTERS, k=7)) for _ in range(12)}
    weights = {word: made.random() ** 4 for word in sorted(words)}
    return {word: weight / sum(weights.values()) for word, weight in weights.items()}


def after(words: Mapping[str, float], tokenizer: Merges, tokens: Sequence[int]) -> Tensor:
    """What comes after some tokens, shape [vocab]; zeros where nothing in the language does."""
    probs = torch.zeros(len(tokenizer.texts) + 1)
    for word, prob in words.items():
        ids = tokenizer.encode(word)
        if len(ids) > len(tokens) and ids[: len(tokens)] == list(tokens):
            probs[ids[len(tokens)]] += prob
    return probs / probs.sum().clamp_min(1e-30)


def how_far(seed: int, sure: float) -> float:
    """How far what is carried is from the truth, at each place of each word, by its likelihood.

    Args:
        seed: Of language and tokenizers.
        sure: The part of the host's own view that is the truth; the rest is alike for all tokens.
    """
    made = random.Random(seed)
    words = language(made)
    small, host = merges(made, list(words)), merges(made, list(words))
    alignment = Alignment(small.strings, host.strings)
    every = torch.arange(len(host.texts) + 1)
    candidates = Candidates.of(every, alignment.host.vocabulary)
    found = defaultdict[tuple[int, ...], float](float)
    for word, prob in words.items():
        ids = host.encode(word)
        for size in range(1, len(ids)):
            found[tuple(ids[:size])] += prob
    return sum(
        prob * _distance(words, small, host, alignment, candidates, before, sure)
        for before, prob in found.items()
    )


def _distance(
    words: Mapping[str, float],
    small: Merges,
    host: Merges,
    alignment: Alignment,
    candidates: Candidates,
    before: Sequence[int],
    sure: float,
) -> float:
    context = b"".join(host.texts[i] for i in before)
    truth = after(words, host, before)[None]
    own = sure * truth + (1 - sure) / len(host.texts)
    own[:, -1] = 0.0
    covers = covers_of(context, small.encode, alignment.small.vocabulary)
    tree = TokenTree()
    ends = [tree.add((len(small.texts), *cover.tokens)) for cover in covers]
    cut = HostCut.of(alignment.host, before[-1], own[0], candidates)
    ways = Ways.of(tree, covers, ends, cut)

    def said(node: int, *tokens: int) -> Tensor:
        return after(words, small, [*(tree.tokens[n] for n in tree.line(node)[1:]), *tokens])

    nodes = sorted(ways.nodes)
    logprobs = torch.stack([said(node) for node in nodes]).log()
    place = {node: number for number, node in enumerate(nodes)}
    inside = [
        (one, said(one.node, one.token_id).log())
        for one in ways.inside(0, logprobs, place, alignment.small)
    ]
    replies = [ways.replies(logprobs, place, alignment.small, inside)]
    asked = still_undecided(alignment, replies, own, candidates)
    told = deal_out(
        alignment, asked, [said(one.node, one.token_id) for one in asked], own, candidates
    )
    return distance(carry_replies(alignment, replies, told, own, candidates)[0], truth[0])


@pytest.mark.parametrize("sure", [0.95, 0.7, 0.3])
def test_what_follows_may_change_how_a_text_is_cut(
    sure: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = fmean(how_far(seed, sure) for seed in range(16))
    monkeypatch.setattr("trimtab.backends.ways.MIN_INSIDE", float("inf"))
    not_inside = fmean(how_far(seed, sure) for seed in range(16))
    assert found < 0.92 * not_inside
    monkeypatch.setattr("trimtab.align.follow.FORESEEN_PROB", 2.0)
    as_the_tokenizers_say = fmean(how_far(seed, sure) for seed in range(16))
    assert not_inside < 0.93 * as_the_tokenizers_say
