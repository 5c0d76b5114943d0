"""The expert run beside a host: what expert and reference think of the host's next token."""

from collections.abc import Iterable, Sequence
from copy import copy
from functools import partial
from typing import final

import torch
from torch import Tensor

from trimtab.align.candidates import Candidates
from trimtab.align.carry import Alignment
from trimtab.align.covers import Cover, covers_of
from trimtab.align.cut import HostCut
from trimtab.align.replies import (
    Asked,
    Reply,
    asked_to_tell,
    carry_replies,
    deal_out,
    dealt,
    numbered_through,
    still_undecided,
)
from trimtab.backends.base import GivesStrings
from trimtab.backends.expert_ahead import ExpertAhead
from trimtab.backends.one_vocabulary import is_one_vocabulary, reads_host_tokens, score_same
from trimtab.backends.pair import Pair, PairStates
from trimtab.backends.pair_passes import prepare, run_pair, states_after
from trimtab.backends.reading import (
    WHO,
    LiveReading,
    PairCaches,
    PairProbs,
    Part,
    Plan,
    RowText,
    Who,
    keep_logits,
    logits_after,
    logits_of_both,
)
from trimtab.backends.said import Said
from trimtab.backends.token_tree import TokenTree
from trimtab.backends.ways import Ways
from trimtab.config import DRAFT_TOKENS
from trimtab.unembedding import Unembedding

DOUBT = 0.03
"""Share of the host's own view in what is carried between vocabularies.

Carrying may be wrong: a token that it rules out is now and then the right one. With the host's
view in both, expert and reference agree on that token, where nothing over nothing would leave a
blend of their ratio without bounds.
"""

EXPECTED_TOKENS = 16
"""Likeliest tokens of the expert that a host is to consider."""


@final
class Live:
    """An expert and its reference, asked about a host's next tokens from the same bytes."""

    def __init__(self, pair: Pair, host: GivesStrings, *, draft_tokens: int = DRAFT_TOKENS) -> None:
        """Align the pair's tokenizer with the host's.

        Args:
            pair: Expert and reference.
            host: The host.
            draft_tokens: Tokens that the expert drafts ahead at most, where a host decodes one
                prompt, for the host to verify in one pass; 0 for none.

        Raises:
            ModelError: The small model is of a family that cannot read texts as a tree.
        """
        prepare(pair)
        self._pair = pair
        self.draft_tokens = draft_tokens
        self._rows: dict[int, PairCaches] = {}
        self.ahead = ExpertAhead(pair)
        self._align(host)

    def _align(self, host: GivesStrings) -> None:
        self.alignment = Alignment(self._pair.reference.strings, host.strings)
        self.is_one_vocabulary = is_one_vocabulary(self._pair.vocabulary, host.vocabulary)

    @property
    def pair(self) -> Pair:
        """Expert and reference."""
        return self._pair

    def onto(self, host: GivesStrings) -> "Live":
        """The same models, with all that they keep of their rows, beside other tokens."""
        other = copy(self)
        other._align(host)
        return other

    def read(
        self,
        contexts: Sequence[bytes],
        *,
        host_ids: Sequence[Sequence[int]] | None = None,
        host_lasts: Sequence[int | None] | None = None,
        start: Sequence[int] | None = None,
        row: int | None = None,
    ) -> LiveReading:
        """Run both models over contexts, as one tree: contexts that begin alike share tokens.

        Where host and small models have one vocabulary, the host's own tokens are the one cover:
        what follows them is then compared token by token, with no loss at any boundary. Elsewhere
        `host_lasts` tell where the host has ended a token, and hence how the text does not go on:
        after the token `u` not with `8` if the host reads `u8` as one token.

        Args:
            contexts: Bytes before each question.
            host_ids: The host's tokens of each context, without those that stand for no text.
            host_lasts: The host's last token of each context where text that is known goes on
                after it, or that the host itself has written; None where somebody else has cut
                the text, as at a prompt's end.
            start: Tokens of the small models that all contexts go on from; no cover gives them
                back (default: what the small models expect before any text).
            row: Keep the key-value caches of this row of a generation; then there is one context,
                or several that each go on from the one before.

        Raises:
            ModelError: A context is longer than the small models can read.
        """
        lasts = [None] * len(contexts) if host_lasts is None else host_lasts
        caches = PairCaches() if row is None else self.caches(row)
        return self._read([self._planned(contexts, host_ids, lasts, start, caches)])[0]

    def read_rows(self, rows: Sequence[RowText]) -> list[LiveReading]:
        """As `read` of each row's one context, both models passing over all rows together.

        Raises:
            ModelError: As `read`.
        """
        return self._read([self._planned_row(row, self.caches(row.row)) for row in rows])

    def can_read(self, row: RowText) -> bool:
        """Whether both models have positions for a row's whole text."""
        small = self._pair.reference
        before = small.context_ids() if row.start is None else row.start
        # No text has more tokens than bytes and, at its beginning, a tokenizer's own space.
        if small.max_tokens is None or len(before) + len(row.context) < small.max_tokens:
            return True
        caches = self._rows.get(row.row) or PairCaches()
        return self._planned_row(row, caches).longest <= small.max_tokens

    def _planned_row(self, row: RowText, caches: PairCaches) -> Plan:
        return self._planned([row.context], [row.host_ids], [row.host_last], row.start, caches)

    def _planned(
        self,
        contexts: Sequence[bytes],
        host_ids: Sequence[Sequence[int]] | None,
        lasts: Sequence[int | None],
        start: Sequence[int] | None,
        caches: PairCaches,
    ) -> Plan:
        """Contexts in the small models' tokens."""
        vocabulary = self._pair.vocabulary
        encode = caches.text(self._pair, follows=start is not None).encode
        start = self._pair.reference.context_ids() if start is None else start
        if self.is_one_vocabulary and host_ids is not None:
            ways = [[Cover(tuple(ids), b"")] for ids in host_ids]
        else:
            ways = [covers_of(context, encode, vocabulary) for context in contexts]
        # A host that puts a space of its own before a text writes its first token alone: after
        # nothing the small models expect no space.
        begins = self.is_one_vocabulary or not self.alignment.host.vocabulary.prefix_space
        covers = [
            [cover for cover in found if cover.tokens or (start and (cover.rest or begins))]
            for found in ways
        ]
        tree = TokenTree()
        ends = [[tree.add([*start, *c.tokens]) for c in ways] for ways in covers]
        return Plan(tree, covers, ends, lasts, caches)

    def caches(self, row: int) -> PairCaches:
        """What both models keep of a row of a generation."""
        return self._rows.setdefault(row, PairCaches())

    def branch(self, row: int, others: Iterable[int]) -> None:
        """Let other rows of a generation go on from what has been read of one."""
        for other in others:
            self._rows[other] = self.caches(row).beside()

    def forget(self, row: int) -> None:
        """Let go of what both models keep of a row that has ended."""
        self._rows.pop(row, None)

    def forget_from(self, first: int) -> None:
        """Let go of what both models keep of all rows but those before the first of these."""
        for row in [row for row in self._rows if row >= first]:
            self.forget(row)

    def score(
        self,
        reading: LiveReading,
        questions: range,
        host_probs: Tensor,
        token_ids: Tensor,
        told_apart: Sequence[int] = (),
    ) -> PairProbs:
        """Score candidate host tokens after some contexts under expert and reference.

        Args:
            reading: What `read` gave.
            questions: Which of its contexts.
            host_probs: The host's own probabilities, shape [questions, candidates].
            token_ids: The candidates, shape [candidates].
            told_apart: For each question a host token which both models are asked to tell from
                others that begin with the same small token, however unlikely these are (default:
                where that matters to what is likely).
        """
        return self._score([Part(reading, questions, host_probs, told_apart)], token_ids)

    def score_all(
        self,
        questions: Sequence[tuple[LiveReading, range]],
        host_probs: Tensor,
        token_ids: Tensor,
    ) -> PairProbs:
        """As `score` of several readings, one after another; what both models run again, together.

        Args:
            questions: What `read` gave, each with those of its contexts that are asked.
            host_probs: The host's own probabilities, a row each, shape [questions, candidates].
            token_ids: The candidates, shape [candidates].
        """
        probs = host_probs.split([len(asked) for _, asked in questions])
        parts = [
            Part(reading, asked, some)
            for (reading, asked), some in zip(questions, probs, strict=True)
        ]
        return self._score(parts, token_ids)

    def _score(self, parts: Sequence[Part], token_ids: Tensor) -> PairProbs:
        if self.is_one_vocabulary and all(reads_host_tokens(part) for part in parts):
            return PairProbs(*(self._same(who, parts, token_ids) for who in WHO))
        candidates = Candidates.of(token_ids, self.alignment.host.vocabulary)
        said = [self._said(part, candidates) for part in parts]
        # One model asks for both, so that a blend's ratio compares like with like.
        asked = [
            self._asked(part, of_part.replies("expert"), candidates)
            for part, of_part in zip(parts, said, strict=True)
        ]
        inside = [[] if self.is_one_vocabulary else of_part.asked_inside for of_part in said]
        after = self._ask_on(
            parts, [[*one, *more] for one, more in zip(asked, inside, strict=True)]
        )
        # Carrying looks at all candidates whatever is carried: once for all parts.
        doubts = numbered_through(asked, [len(part.questions) for part in parts])
        host_probs = torch.cat([part.host_probs for part in parts])
        found: dict[Who, Tensor] = {}
        for who in WHO:
            replies, told = list[list[Reply]](), list[Tensor]()
            for of_part, one, probs in zip(said, asked, after[who], strict=True):
                told += probs[: len(one)]
                replies += of_part.replies(who, probs[len(one) :])
            found[who] = self._carried(replies, doubts, told, host_probs, candidates)
        return PairProbs(**found)

    def _same(self, who: Who, parts: Sequence[Part], token_ids: Tensor) -> Tensor:
        is_text = self.alignment.is_text
        found = [
            score_same(part, partial(self.logits, part.reading, who), token_ids, is_text)
            for part in parts
        ]
        return torch.cat(found)

    def _carried(
        self,
        replies: Sequence[Sequence[Reply]],
        asked: Sequence[Asked],
        after: Sequence[Tensor],
        host_probs: Tensor,
        candidates: Candidates,
    ) -> Tensor:
        """What one model says over the candidates."""
        dealt = deal_out(self.alignment, asked, after, host_probs, candidates)
        carried = carry_replies(self.alignment, replies, dealt, host_probs, candidates)
        return carried if self.is_one_vocabulary else torch.lerp(carried, host_probs, DOUBT)

    def expected(
        self, reading: LiveReading, questions: range, count: int = EXPECTED_TOKENS
    ) -> Tensor:
        """Host tokens that the expert expects, whatever the host thinks of them, ascending.

        Args:
            reading: What `read` gave.
            questions: Which of its contexts.
            count: Likeliest tokens of the expert that count.

        Returns:
            Of each context the host tokens with which the host begins the expert's likeliest next
            tokens, where the context ends with a token of the small models.
        """
        likely = self.expected_small(reading, questions, count)
        if self.is_one_vocabulary or not len(likely):
            # Rows that only the small models have, to fill them up, are no tokens of the host.
            return likely[likely < len(self.alignment.host.vocabulary)]
        first = self.alignment.first_host(likely).unique()
        return first[first >= 0]

    def expected_small(self, reading: LiveReading, questions: range, count: int) -> Tensor:
        """The small tokens of `expected`, ascending."""
        nodes = [
            reading.ends[question][0]
            for question in questions
            if reading.covers[question] and not reading.covers[question][0].rest
        ]
        if not nodes:
            return torch.zeros(0, dtype=torch.long)
        logits = self.logits(reading, "expert", nodes)
        return logits.topk(min(count, logits.shape[1]), -1).indices.unique()

    def _said(self, part: Part, candidates: Candidates) -> Said:
        reading, cuts = part.reading, self._cuts(part, candidates)
        ways = [
            Ways.of(reading.tree, reading.covers[question], reading.ends[question], cut)
            for question, cut in zip(part.questions, cuts, strict=True)
        ]
        nodes = sorted({node for way in ways for node in way.nodes})
        place = {node: number for number, node in enumerate(nodes)}
        logprobs: dict[Who, Tensor] = {who: torch.zeros(0, 1) for who in WHO}
        if nodes:
            logprobs = {who: self.logits(reading, who, nodes).log_softmax(-1) for who in WHO}
        return Said(ways, logprobs, place, self.alignment.small)

    def _asked(
        self, part: Part, replies: Sequence[Sequence[Reply]], candidates: Candidates
    ) -> list[Asked]:
        if self.is_one_vocabulary:
            return []
        found = still_undecided(self.alignment, replies, part.host_probs, candidates)
        found += asked_to_tell(self.alignment, replies, part.told_apart)
        longest, depths = self._pair.reference.max_tokens, part.reading.tree.depths
        return [
            one for one in dict.fromkeys(found) if longest is None or depths[one.node] + 1 < longest
        ]

    def _cuts(self, part: Part, candidates: Candidates) -> list[HostCut | None]:
        if self.is_one_vocabulary:
            return [None] * len(part.questions)
        lasts = part.reading.host_lasts[part.questions.start : part.questions.stop]
        return [
            None if last is None else HostCut.of(self.alignment.host, last, probs, candidates)
            for last, probs in zip(lasts, part.host_probs, strict=True)
        ]

    def _read(self, plans: Sequence[Plan]) -> list[LiveReading]:
        """Let both models pass over what is planned."""
        for plan in plans:
            plan.check(self._pair.reference)
        some = [plan for plan in plans if plan.tree.tokens]
        states = iter(run_pair(self._pair, [(plan.tree, plan.caches) for plan in some]))
        nothing = PairStates(torch.zeros(0, 1), torch.zeros(0, 1))
        readings = [
            LiveReading(
                plan.tree,
                plan.covers,
                plan.ends,
                plan.host_lasts,
                next(states) if plan.tree.tokens else nothing,
                plan.caches,
            )
            for plan in plans
        ]
        keep_logits({who: self._head(who) for who in WHO}, readings)
        return readings

    def logits(self, reading: LiveReading, who: Who, nodes: Sequence[int]) -> Tensor:
        """Logits after some nodes, in float32 on the CPU, shape [nodes, vocab]."""
        return logits_after(reading, who, {who: self._head(who)}, nodes)

    def _head(self, who: Who) -> Unembedding:
        pair = self._pair
        return pair.expert_unembedding if who == "expert" else pair.reference_unembedding

    def _ask_on(
        self, parts: Sequence[Part], asked: Sequence[Sequence[Asked]]
    ) -> dict[Who, list[list[Tensor]]]:
        """What both models say after tokens that follow nodes: by part, probabilities [vocab]."""
        leaves = [sorted({(one.node, one.token_id) for one in of_part}) for of_part in asked]
        if not any(leaves):
            return {who: [[] for _ in parts] for who in WHO}
        states = states_after(self._pair, [part.reading for part in parts], leaves)
        both: dict[Who, Tensor] = {who: getattr(states, who) for who in WHO}
        logits = logits_of_both({who: self._head(who) for who in WHO}, both)
        return {who: dealt(logits[who].softmax(-1), leaves, asked) for who in WHO}
