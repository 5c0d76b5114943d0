"""Tokens that a host has not shown: how likely they are beforehand, and which of them matter."""

from functools import cached_property
from typing import final

import torch
from torch import Tensor

from trimtab.backends.live import Live
from trimtab.backends.reading import LiveReading
from trimtab.vocab import Vocabulary

RANK_OFFSET = 1_000
"""So many of the first tokens are about equally frequent; from there on Zipf's law holds."""


def rank_prior(vocabulary: Vocabulary) -> Tensor:
    """How likely a host's tokens are before anything is read, as far as their ids tell.

    A tokenizer numbers its tokens in the order in which it was given them, frequent ones first, so
    that an id is a rank: p ~ 1 / (rank + offset), Zipf's law. Single characters are the exception:
    some tokenizers number them last. ASCII's have rank 0 here, and others the rank of their id.

    Args:
        vocabulary: Of the host.

    Returns:
        Probabilities that sum to one, 0 for tokens that stand for no text, shape [vocab].
    """
    texts = vocabulary.token_bytes
    rank = torch.arange(len(texts), dtype=torch.float64)
    rank[torch.tensor([text is not None and len(text) == 1 for text in texts])] = 0.0
    weight = 1.0 / (rank + RANK_OFFSET)
    weight[torch.tensor([not text for text in texts])] = 0.0
    return (weight / weight.sum()).float()


@final
class Unseen:
    """The vocabulary of a host of which a few tokens are shown at a time."""

    def __init__(self, live: Live) -> None:
        """Read the host's vocabulary.

        Args:
            live: Expert and reference beside the host.
        """
        self.live = live
        self.prior = rank_prior(live.alignment.host.vocabulary)
        """As `rank_prior` has it, shape [vocab]."""

    def begun_alike(self, token_id: int) -> Tensor:
        """Host tokens that begin with the same small token as one of them, it included."""
        first = self._first
        if int(first[token_id]) < 0:
            return torch.tensor([token_id])
        return torch.nonzero(first == first[token_id])[:, 0]

    def likely(self, reading: LiveReading, questions: range, count: int) -> Tensor:
        """Host tokens that the expert may mean, whatever the host has shown, ascending.

        A small token lends its probability to the host tokens that it begins, in proportion to what
        these have beforehand; of each context the `count` likeliest count.

        Args:
            reading: How the small models have read the contexts.
            questions: Which of them.
            count: Tokens of each context.
        """
        expected = self.live.expected(reading, questions, count)
        if self.live.is_one_vocabulary:
            return expected
        nodes = [
            end
            for question in questions
            for cover, end in zip(reading.covers[question], reading.ends[question], strict=True)
            if not cover.rest
        ]
        if not nodes:
            return expected
        first = self._first
        known = first >= 0
        first = first.clamp_min(0)
        own = self.prior * known
        mass = torch.zeros(len(self.live.pair.vocabulary)).index_add(0, first, own)
        share = own / mass[first].clamp_min(1e-30)
        probs = self.live.logits(reading, "expert", sorted(set(nodes))).softmax(-1)
        found = (probs[:, first] * share).topk(min(count, len(share)), -1).indices
        return torch.cat([found.flatten(), expected]).unique()

    @cached_property
    def _first(self) -> Tensor:
        """The small token that begins each host token; -1 if none."""
        return self.live.alignment.first_small(torch.arange(len(self.prior)))
