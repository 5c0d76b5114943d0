"""The expert run beside a host: what expert and reference think of the host's next token."""

from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, final

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
    still_undecided,
)
from trimtab.backends.base import GivesStrings
from trimtab.backends.pair import Pair, PairStates
from trimtab.backends.token_tree import ModelCache, TokenTree, check_tree, run_after, run_tree
from trimtab.backends.ways import Ways
from trimtab.config import DRAFT_TOKENS
from trimtab.errors import ModelError
from trimtab.vocab import Vocabulary

DOUBT = 0.03
"""Share of the host's own view in what is carried between vocabularies.

Carrying may be wrong: a token that it rules out is now and then the right one. With the host's
view in both, expert and reference agree on that token, where nothing over nothing would leave a
blend of their ratio without bounds.
"""

EXPECTED_TOKENS = 16
"""Likeliest tokens of the expert that a host is to consider."""

FEW_NODES = 64
"""Contexts' ends whose logits are computed at once and kept until the next reading."""


Who = Literal["expert", "reference"]
"""One of the pair."""


class OwnReading(NamedTuple):
    """A text as both models have read it, on their own tokens.

    Attributes:
        token_ids: All tokens, those before the text included.
        states: What each model has made of them, two tensors of shape [tokens, hidden].
    """

    token_ids: list[int]
    states: PairStates


class PairProbs(NamedTuple):
    """Probabilities of the candidates, each [contexts, candidates]; each row sums to <= 1."""

    expert: Tensor
    reference: Tensor


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
        check_tree(pair.reference)
        self._pair = pair
        self.draft_tokens = draft_tokens
        self._rows: dict[int, PairCaches] = {}
        self._align(host)

    def _align(self, host: GivesStrings) -> None:
        self.alignment = Alignment(self._pair.reference.strings, host.strings)
        self.is_one_vocabulary = _unpadded(self._pair.vocabulary) == _unpadded(host.vocabulary)

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
    ) -> "LiveReading":
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
        reference, vocabulary = self._pair.reference, self._pair.vocabulary
        encode = reference.encode if start is None else reference.encode_following
        start = reference.context_ids() if start is None else start
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
        longest = len(start) + max((len(c.tokens) for ways in covers for c in ways), default=0)
        if reference.max_tokens is not None and longest > reference.max_tokens:
            raise ModelError(
                f"the text has {longest} tokens of {reference.ref}, which reads at most"
                f" {reference.max_tokens}",
                hint="give a shorter text, or use --carriers head,memory",
            )
        tree = TokenTree()
        ends = [[tree.add([*start, *c.tokens]) for c in ways] for ways in covers]
        lasts = [None] * len(contexts) if host_lasts is None else host_lasts
        caches = PairCaches() if row is None else self.caches(row)
        return LiveReading(tree, covers, ends, lasts, *self._states(tree, caches), caches)

    def caches(self, row: int) -> "PairCaches":
        """What both models keep of a row of a generation."""
        return self._rows.setdefault(row, PairCaches())

    def forget(self, row: int) -> None:
        """Let go of what both models keep of a row that has ended."""
        self._rows.pop(row, None)

    def score(
        self,
        reading: "LiveReading",
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
        candidates = Candidates.of(token_ids, self.alignment.host.vocabulary)
        ways = [
            Ways.of(reading.tree, reading.covers[question], reading.ends[question], cut)
            for question, cut in zip(
                questions, self._cuts(reading, questions, host_probs, candidates), strict=True
            )
        ]
        replies = (
            self._replies(reading, "expert", ways),
            self._replies(reading, "reference", ways),
        )
        over = (host_probs, candidates)
        # One model asks for both, so that a blend's ratio compares like with like.
        asked = self._asked(reading, replies[0], over, told_apart)
        carried = [
            carry_replies(
                self.alignment, side, deal_out(self.alignment, asked, after, *over), *over
            )
            for side, after in zip(replies, self._ask_on(reading, asked), strict=True)
        ]
        if not self.is_one_vocabulary:
            carried = [torch.lerp(side, host_probs, DOUBT) for side in carried]
        return PairProbs(*carried)

    def expected(
        self, reading: "LiveReading", questions: range, count: int = EXPECTED_TOKENS
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
            return likely
        first = self.alignment.first_host(likely).unique()
        return first[first >= 0]

    def expected_small(self, reading: "LiveReading", questions: range, count: int) -> Tensor:
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

    def _asked(
        self,
        reading: "LiveReading",
        replies: Sequence[Sequence[Reply]],
        over: tuple[Tensor, Candidates],
        told_apart: Sequence[int],
    ) -> list[Asked]:
        if self.is_one_vocabulary:
            return []
        found = still_undecided(self.alignment, replies, *over)
        also = asked_to_tell(self.alignment, replies, told_apart)
        longest = self._pair.reference.max_tokens
        return [
            one
            for one in dict.fromkeys([*found, *also])
            if longest is None or reading.tree.depths[one.node] + 1 < longest
        ]

    def _cuts(
        self, reading: "LiveReading", questions: range, host_probs: Tensor, candidates: Candidates
    ) -> list[HostCut | None]:
        if self.is_one_vocabulary:
            return [None] * len(questions)
        return [
            None if last is None else HostCut.of(self.alignment.host, last, probs, candidates)
            for last, probs in zip(
                reading.host_lasts[questions.start : questions.stop], host_probs, strict=True
            )
        ]

    def _states(self, tree: TokenTree, caches: "PairCaches") -> tuple[Tensor, Tensor]:
        if not tree.tokens:
            return torch.zeros(0, 1), torch.zeros(0, 1)
        reference = run_tree(self._pair.reference, tree, caches.reference)
        with self._pair.as_expert() as expert:
            return run_tree(expert, tree, caches.expert), reference

    def _replies(self, reading: "LiveReading", who: Who, ways: Sequence[Ways]) -> list[list[Reply]]:
        asked = sorted({node for way in ways for node in way.nodes})
        if not asked:
            return [[] for _ in ways]
        logprobs = self.logits(reading, who, asked).log_softmax(-1)
        place = {node: number for number, node in enumerate(asked)}
        return [way.replies(logprobs, place, self.alignment.small) for way in ways]

    def logits(self, reading: "LiveReading", who: Who, nodes: Sequence[int]) -> Tensor:
        """Logits after some nodes, in float32 on the CPU, shape [nodes, vocab].

        Where few contexts were read they are asked one by one, and each more than once: as a head's
        matrix hardly fits through a processor's memory, it is read once for all of them.
        """
        states = reading.expert if who == "expert" else reading.reference
        head = self._pair.expert_unembedding
        head = head if who == "expert" else self._pair.reference_unembedding
        ends = {node for ends in reading.ends for node in ends}
        if len(ends) > FEW_NODES:
            with torch.no_grad():
                return head.logits(states[list(nodes)]).float().cpu()
        kept = reading.kept_logits[who]
        if missing := sorted({*nodes} - kept.keys()):
            missing = sorted({*missing, *ends} - kept.keys())
            with torch.no_grad():
                found = head.logits(states[missing]).float().cpu()
            kept.update(zip(missing, found, strict=True))
        return torch.stack([kept[node] for node in nodes])

    def _ask_on(
        self, reading: "LiveReading", asked: Sequence[Asked]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """What expert and reference say after tokens that follow nodes: probabilities, [vocab]."""
        if not asked:
            return [], []
        leaves = sorted({(one.node, one.token_id) for one in asked})
        reference = run_after(self._pair.reference, reading.tree, leaves, reading.caches.reference)
        with self._pair.as_expert() as model:
            expert = run_after(model, reading.tree, leaves, reading.caches.expert)
        rows = [leaves.index((one.node, one.token_id)) for one in asked]
        with torch.no_grad():
            expert = self._pair.expert_unembedding.logits(expert).float().cpu().softmax(-1)
            reference = self._pair.reference_unembedding.logits(reference).float().cpu().softmax(-1)
        return [expert[row] for row in rows], [reference[row] for row in rows]


@dataclass
class PairCaches:
    """What both models keep of the last contexts that they have read."""

    reference: ModelCache = field(default_factory=ModelCache)
    expert: ModelCache = field(default_factory=ModelCache)


@dataclass(frozen=True)
class LiveReading:
    """Contexts as both models have read them.

    Attributes:
        tree: All token sequences.
        covers: Ways to read each context.
        ends: Node of each way's last token.
        host_lasts: As given to `read`.
        expert: Final hidden states of the nodes, shape [nodes, hidden].
        reference: Likewise.
        caches: Keys and values of all nodes, until the same row is read again.
        kept_logits: By model the logits after nodes that have been asked for, each [vocab].
    """

    tree: TokenTree
    covers: list[list[Cover]]
    ends: list[list[int]]
    host_lasts: Sequence[int | None]
    expert: Tensor
    reference: Tensor
    caches: PairCaches
    kept_logits: dict[Who, dict[int, Tensor]] = field(
        default_factory=lambda: {"expert": {}, "reference": {}}
    )

    def reference_states(self, questions: range) -> list[Tensor | None]:
        """The reference's state after some contexts, read as its tokenizer cuts them.

        None where a context ends inside a character, or where there is nothing to read.
        """
        return [
            self.reference[self.ends[q][0]]
            if self.covers[q] and not self.covers[q][0].rest
            else None
            for q in questions
        ]

    def own(self, question: int) -> OwnReading:
        """How the small models' tokenizer cuts a context, and what both models make of that."""
        nodes = self.tree.line(self.ends[question][0])
        states = PairStates(self.reference[nodes], self.expert[nodes])
        return OwnReading([self.tree.tokens[node] for node in nodes], states)


def _unpadded(vocabulary: Vocabulary) -> tuple[bytes | None, ...]:
    """Its tokens without the rows that only fill it up, whose number differs in one family."""
    end = len(vocabulary)
    while end and vocabulary.token_bytes[end - 1] is None:
        end -= 1
    return vocabulary.token_bytes[:end]
