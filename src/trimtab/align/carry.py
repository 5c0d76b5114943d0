"""Carries a small model's next-token distribution over to a host's tokens.

At a host's decoding step the context is a byte string. The small model may have read it as
several token sequences (`covers.py`): after each, its next token either starts where the context
ends, or begins with a rest of the context and goes beyond it.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch
from torch import Tensor

from trimtab.align.candidates import Candidates, FirstTokens
from trimtab.align.strings import KEPT_ANSWERS, Strings, token_lengths
from trimtab.vocab import Vocabulary

LEAST_PROB = 1e-7
"""What no candidate takes and is less likely than this is not followed."""


@dataclass(frozen=True)
class Alignment:
    """What carries a small model's distribution to a host's tokens.

    Attributes:
        small: The small model's strings.
        host: The host's strings.
    """

    small: Strings
    host: Strings

    @cached_property
    def may_read_otherwise(self) -> bool:
        """Whether what follows may change how a tokenizer reads bytes that it was asked about.

        Not where one tokenizer serves both, which then reads them alike in both, nor where the
        longest token is taken for want of a tokenizer.
        """
        asked = self.small.encode is not None or self.host.encode is not None
        return asked and self.small.vocabulary.ids_by_bytes != self.host.vocabulary.ids_by_bytes

    @cached_property
    def first_small(self) -> FirstTokens:
        """For each host token, the small token that begins it; -1 if none."""
        return FirstTokens(self.host.vocabulary, self.small.first_of_each)

    @cached_property
    def other_small(self) -> FirstTokens:
        """For each host token, another small token that may begin it as well; -1 if none."""
        return FirstTokens(
            self.host.vocabulary, lambda texts: [self._other_first(text) for text in texts]
        )

    @cached_property
    def first_host(self) -> FirstTokens:
        """For each small token, the host token that begins it; -1 if none."""
        return FirstTokens(self.small.vocabulary, self.host.first_of_each)

    def _other_first(self, run: bytes) -> int:
        """What begins a run of white space where only one tokenizer leaves its last to a word.

        Then the run of one tokenizer is one longer than that of the other; if no word follows,
        both are the same.
        """
        last = run[-1:]
        if run.strip() or (last in self.small.leaves) == (last in self.host.leaves):
            return -1
        other = self.small.first_token(run[:-1] if last in self.small.leaves else run + last)
        return -1 if other == self.small.first_token(run) else other

    @cached_property
    def firsts_of(self) -> Callable[[bytes], tuple[int, ...]]:
        """Tells the small tokens that may begin a text: one or two, or none."""
        return lru_cache(KEPT_ANSWERS)(self._find_firsts)

    def _find_firsts(self, text: bytes) -> tuple[int, ...]:
        found = (self.small.first_token(text), self._other_first(text))
        return tuple(token_id for token_id in found if token_id >= 0)

    @cached_property
    def is_known(self) -> Tensor:
        """Whether a small token begins it, for each host token, shape [vocab of host]."""
        return _is_begun(self.host.vocabulary, self.small)

    @cached_property
    def is_foreign(self) -> Tensor:
        """Whether no small token leads to it, for each host token, shape [vocab of host]."""
        foreign = ~self.is_known
        texts = self.small.vocabulary.token_bytes
        if not (foreign & (token_lengths(self.host.vocabulary) > 0)).any():
            # What stands for no text is the longest token of none.
            return foreign
        ends = torch.tensor([self.host.longest_token(text) if text else -1 for text in texts])
        foreign[ends[ends >= 0]] = False
        return foreign

    @cached_property
    def is_cut(self) -> Tensor:
        """Whether it is text that no host token stands for, for each small token, shape [vocab]."""
        ids = self.host.vocabulary.ids_by_bytes
        return torch.tensor(
            [bool(text) and text not in ids for text in self.small.vocabulary.token_bytes]
        )

    @cached_property
    def is_text(self) -> Tensor:
        """Whether it stands for text, for each small token, shape [vocab of small]."""
        return token_lengths(self.small.vocabulary) > 0

    def to_host(
        self,
        probs: Tensor,
        host_probs: Tensor,
        token_ids: Tensor,
        told: Sequence[Mapping[int, Tensor]] | None = None,
    ) -> Tensor:
        """Carry distributions over what comes next from small tokens to host tokens.

        A small token t lends its probability to the host tokens that begin with it (those that
        its own tokenizer would begin with t), in the proportions that it has itself `told` when it
        was asked what follows t, or else in those in which the host itself continues t. A run of
        white space may begin with two small tokens (`other_small`), and then gets a share of both.
        A small token that no host token begins with lends its probability to the host token with
        which the host begins t; one that is no host token itself lends to both (`share_of_longer`).
        Without runs and such tokens, and with nothing told, the result is the distribution nearest
        to the host's (in KL) with the small model's first-token masses.

        Of host tokens that no small token leads to the small model says nothing, above all of
        those that end a text: they keep the host's probability, and the small model's distribution
        over tokens of text, given that text goes on, is dealt out over the others.

        Args:
            probs: Over small tokens, shape [positions, vocab of small].
            host_probs: The host's own over the candidates, shape [positions, candidates].
            token_ids: The candidates, shape [candidates].
            told: For each position, by small token, its shares of the candidates (`after_token`),
                each of shape [candidates] (default: nothing).

        Returns:
            Shape [positions, candidates]; what is missing to one belongs to other tokens.
        """
        first, other = self.first_small(token_ids), self.other_small(token_ids)
        known, known_as_other = host_probs * (first >= 0), host_probs * (other >= 0)
        foreign = host_probs * self.is_foreign[token_ids]
        first, other = first.clamp_min(0), other.clamp_min(0)
        text_mass = (probs @ self.is_text.to(probs.dtype))[:, None].clamp_min(1e-30)
        scale = (1.0 - foreign.sum(-1, keepdim=True)) / text_mass
        # A vocabulary's many unlikely tokens lend nothing: all but these are passed over.
        lends = (probs * scale >= LEAST_PROB).any(0)
        lends[first] = lends[other] = True
        lends[[t for shares_of in told or () for t in shares_of]] = True
        lenders = torch.nonzero(lends)[:, 0]
        first, other = torch.searchsorted(lenders, torch.stack([first, other]))
        probs = probs[:, lenders] * scale
        mass = torch.zeros_like(probs).index_add(-1, first, known)
        mass = mass.index_add(-1, other, known_as_other)
        carried = foreign.clone()
        for position, shares_of in enumerate(told or ()):
            for token_id, shares in shares_of.items():
                place = int(torch.searchsorted(lenders, token_id))
                carried[position] += probs[position, place] * shares
                probs[position, place] = 0.0
        places = torch.full((len(self.host.vocabulary),), -1)
        places[token_ids] = torch.arange(len(token_ids))
        alone = self._left_alone(probs, mass, host_probs, lenders, places)
        lent = (probs - alone) / mass.clamp_min(1e-30)
        carried += known * lent[:, first] + known_as_other * lent[:, other]
        return self._with_those_alone(carried, alone, lenders, places)

    def _with_those_alone(
        self, carried: Tensor, alone: Tensor, small_ids: Tensor, places: Tensor
    ) -> Tensor:
        """Add what small tokens lend to the host tokens that begin them; as for `_left_alone`."""
        lenders = torch.nonzero((alone >= LEAST_PROB).any(0))[:, 0]
        takers = self._takers(small_ids[lenders], places)
        return carried.index_add_(
            -1, takers.clamp_min(0), alone[:, lenders] * (takers >= 0).to(alone.dtype)
        )

    def _left_alone(
        self, probs: Tensor, mass: Tensor, host_probs: Tensor, small_ids: Tensor, places: Tensor
    ) -> Tensor:
        """What small tokens lend to the host tokens that begin them, shape [positions, small_ids].

        All that they have, where they begin no candidate.

        Args:
            probs: Of some small tokens, shape [positions, small_ids].
            mass: The host's, of the candidates that each begins, of the same shape.
            host_probs: As for `to_host`.
            small_ids: The small tokens, shape [small_ids].
            places: Of each host token among the candidates, -1 for none, shape [vocab of host].
        """
        alone = probs * (mass <= 0)
        both_ways = ((mass > 0) & (probs >= LEAST_PROB)).any(0)
        lenders = torch.nonzero(self.is_cut[small_ids] & both_ways)[:, 0]
        takers = self._takers(small_ids[lenders], places)
        lenders, takers = lenders[takers >= 0], takers[takers >= 0]
        if len(lenders):
            own = probs[:, lenders]
            longer = share_of_longer(own, mass[:, lenders], host_probs[:, takers])
            alone[:, lenders] = own * (1.0 - longer)
        return alone

    def _takers(self, small_ids: Tensor, places: Tensor) -> Tensor:
        """Places of the candidates with which the host begins small tokens, -1 for none."""
        takers = self.first_host(small_ids)
        return torch.where(takers >= 0, places[takers.clamp_min(0)], -1)

    def begun_by(self, token_id: int, candidates: Candidates) -> Tensor:
        """Places of the candidates that a small token may begin."""
        first, other = self._begin_of(candidates)
        return torch.nonzero((first == token_id) | (other == token_id))[:, 0]

    @cached_property
    def _begin_of(self) -> Callable[[Candidates], tuple[Tensor, Tensor]]:
        # A step asks about the same candidates again and again.
        return lru_cache(1)(
            lambda c: (self.first_small(c.token_ids), self.other_small(c.token_ids))
        )


def share_of_longer(probs: Tensor, longer: Tensor, shorter: Tensor) -> Tensor:
    """Share of a small token, which is no host token, that goes to host tokens longer than it.

    The host says how likely these are; the rest is of texts that it begins with a shorter token.
    But of what it gives to that one only a part, unknown to it, is of texts that begin with the
    small token, so that the longer ones have no less than their share beside it.

    Args:
        probs: Of the small token.
        longer: The host's, of the tokens that it begins, of the same shape.
        shorter: The host's, of the token with which the host begins it, of the same shape.
    """
    least = longer / (longer + shorter).clamp_min(1e-30)
    return torch.maximum((longer / probs.clamp_min(1e-30)).clamp_max(1.0), least)


def _is_begun(vocabulary: Vocabulary, by: Strings) -> Tensor:
    """Whether a token begins it, for each text of a vocabulary, shape [vocab]."""
    ids = by.vocabulary.ids_by_bytes
    # The shortest beginning is nearly always a token.
    return torch.tensor(
        [
            any(text[:size] in ids for size in range(1, len(text) + 1)) if text else False
            for text in vocabulary.token_bytes
        ]
    )
