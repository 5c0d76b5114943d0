"""Carries a small model's next-token distribution over to a host's tokens.

At a host's decoding step the context is a byte string. The small model may have read it as
several token sequences (`covers.py`): after each, its next token either starts where the context
ends, or begins with a rest of the context and goes beyond it.
"""

import bisect
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch
from torch import Tensor

from trimtab.align.strings import KEPT_ANSWERS, Strings, end_of
from trimtab.vocab import Vocabulary

REST_TOKENS = 64
"""Likeliest tokens that are followed one by one where a token must begin with a rest."""

REST_SHARE = 1e-3
"""Tokens with a smaller share than this are not followed."""

HOST_TOKENS = 256
"""Likeliest host tokens among which those are sought that such a token leads to."""


@dataclass(frozen=True)
class Candidates:
    """The host tokens that a step considers, in byte order where that helps.

    Attributes:
        token_ids: Host token ids, shape [candidates].
        texts: Their bytes, sorted; special tokens are left out.
        order: Place in `token_ids` of each of `texts`.
    """

    token_ids: Tensor
    texts: tuple[bytes, ...]
    order: Tensor

    @staticmethod
    def of(token_ids: Tensor, host: Vocabulary) -> "Candidates":
        """Sort the candidates of a host."""
        pairs = sorted(
            (text, place)
            for place, token_id in enumerate(token_ids.tolist())
            if (text := host.token_bytes[token_id])
        )
        texts = tuple(text for text, _ in pairs)
        return Candidates(
            token_ids, texts, torch.tensor([place for _, place in pairs], dtype=torch.long)
        )

    def beginning_with(self, start: bytes) -> range:
        """Which of `texts` begin with `start`, it included."""
        return range(bisect.bisect_left(self.texts, start), end_of(self.texts, start))

    def longest_beginning(self, text: bytes) -> int:
        """Place of the longest candidate that begins `text`; -1 if none does."""
        for length in range(len(text), 0, -1):
            place = bisect.bisect_left(self.texts, text[:length])
            if place < len(self.texts) and self.texts[place] == text[:length]:
                return int(self.order[place])
        return -1


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
    def first_small(self) -> Tensor:
        """For each host token, the longest small token that begins it; -1 if none."""
        return _firsts(self.host.vocabulary, self.small)

    @cached_property
    def other_small(self) -> Tensor:
        """For each host token, another small token that may begin it as well; -1 if none."""
        texts = self.host.vocabulary.token_bytes
        return torch.tensor([self._other_first(text) if text else -1 for text in texts])

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
    def _firsts_of(self) -> Callable[[bytes], tuple[int, ...]]:
        return lru_cache(KEPT_ANSWERS)(self._find_firsts)

    def _find_firsts(self, text: bytes) -> tuple[int, ...]:
        """The small tokens that may begin a text: one or two, or none."""
        found = (self.small.first_token(text), self._other_first(text))
        return tuple(token_id for token_id in found if token_id >= 0)

    @cached_property
    def first_host(self) -> Tensor:
        """For each small token, the longest host token that begins it; -1 if none."""
        return _firsts(self.small.vocabulary, self.host)

    @cached_property
    def _is_foreign(self) -> Tensor:
        foreign = self.first_small < 0
        foreign[self.first_host[self.first_host >= 0]] = False
        return foreign

    @cached_property
    def _is_text(self) -> Tensor:
        return torch.tensor([bool(text) for text in self.small.vocabulary.token_bytes])

    def to_host(self, probs: Tensor, host_probs: Tensor, token_ids: Tensor) -> Tensor:
        """Carry distributions over what comes next from small tokens to host tokens.

        A small token t lends its probability to the host tokens that begin with it (t is the
        longest small token that begins them), in the proportions in which the host itself
        continues t: the small model says nothing there yet. A run of white space may begin with
        two small tokens (`other_small`), and then gets a share of both. A small token that no host
        token begins with lends its probability to the longest host token that begins t. Without
        runs the result is the distribution nearest to the host's (in KL) with the small model's
        first-token masses.

        Of host tokens that no small token leads to the small model says nothing, above all of
        those that end a text: they keep the host's probability, and the small model's distribution
        over tokens of text, given that text goes on, is dealt out over the others.

        Args:
            probs: Over small tokens, shape [positions, vocab of small].
            host_probs: The host's own over the candidates, shape [positions, candidates].
            token_ids: The candidates, shape [candidates].

        Returns:
            Shape [positions, candidates]; what is missing to one belongs to other tokens.
        """
        first = self.first_small[token_ids]
        known = host_probs * (first >= 0)
        foreign = host_probs * self._is_foreign[token_ids]
        other = self.other_small[token_ids]
        known_as_other = known * (other >= 0)
        first, other = first.clamp_min(0), other.clamp_min(0)
        text_mass = probs[..., self._is_text].sum(-1, keepdim=True).clamp_min(1e-30)
        probs = probs * (1.0 - foreign.sum(-1, keepdim=True)) / text_mass
        mass = torch.zeros_like(probs).index_add(-1, first, known)
        mass = mass.index_add(-1, other, known_as_other)
        lent = probs / mass.clamp_min(1e-30)
        carried = foreign + known * lent[:, first] + known_as_other * lent[:, other]
        place = torch.full((len(self.host.vocabulary),), -1)
        place[token_ids] = torch.arange(len(token_ids))
        target = torch.where(self.first_host >= 0, place[self.first_host.clamp_min(0)], -1)
        alone = probs * ((mass <= 0) & (target >= 0))
        return carried.index_add(-1, target.clamp_min(0), alone)

    def rest_to_host(
        self, probs: Tensor, rest: bytes, host_probs: Tensor, candidates: Candidates
    ) -> Tensor:
        """The same where the next small token begins with `rest` and goes beyond it.

        Args:
            probs: Over small tokens, shape [vocab of small].
            rest: Bytes of the context that the next token repeats.
            host_probs: The host's own over the candidates, shape [candidates].
            candidates: The candidates.

        Returns:
            Shape [candidates], given that the token goes beyond `rest`.
        """
        ids = self.small.longer_than(rest)
        chosen = probs[ids]
        total = float(chosen.sum())
        if total <= 0:
            return host_probs
        carried = torch.zeros_like(host_probs)
        led_to = self._led_to(rest, host_probs, candidates)
        top = chosen.topk(min(len(ids), REST_TOKENS))
        token_bytes = self.small.vocabulary.token_bytes
        for prob, place in zip(top.values.tolist(), top.indices.tolist(), strict=True):
            if prob < REST_SHARE * total:
                break
            token_id = int(ids[place])
            suffix = (token_bytes[token_id] or b"")[len(rest) :]
            # What the host does not expect may still be what the small model means.
            places = led_to.get(token_id) or self._all_led_to(token_id, rest, suffix, candidates)
            within = torch.tensor(places, dtype=torch.long)
            shares = host_probs[within]
            if float(shares.sum()) > 0:
                carried[within] += prob / total * shares / shares.sum()
            elif (longest := candidates.longest_beginning(suffix)) >= 0:
                carried[longest] += prob / total
        # What was not followed one by one, and the end of a text, are left to the host's own view.
        followed, foreign = float(carried.sum()), host_probs.clone()
        foreign[candidates.order] = 0.0
        going_on = 1.0 - float(foreign.sum())
        return foreign + going_on * carried + (1.0 - followed) * (host_probs - foreign)

    def _all_led_to(
        self, token_id: int, rest: bytes, suffix: bytes, candidates: Candidates
    ) -> list[int]:
        """Places of all candidates that one small token leads to."""
        return [
            int(candidates.order[place])
            for place in candidates.beginning_with(suffix)
            if token_id in self._firsts_of(rest + candidates.texts[place])
        ]

    def _led_to(
        self, rest: bytes, host_probs: Tensor, candidates: Candidates
    ) -> dict[int, list[int]]:
        """Places of the likeliest candidates by the small tokens that begin with rest and them."""
        likely = host_probs[candidates.order].topk(min(len(candidates.order), HOST_TOKENS))
        led_to: dict[int, list[int]] = {}
        for place in likely.indices.tolist():
            for token_id in self._firsts_of(rest + candidates.texts[place]):
                led_to.setdefault(token_id, []).append(int(candidates.order[place]))
        return led_to


def _firsts(vocabulary: Vocabulary, strings: Strings) -> Tensor:
    return torch.tensor(
        [strings.first_token(text) if text else -1 for text in vocabulary.token_bytes]
    )
