"""The expert run beside a host: what expert and reference think of the host's next token."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, final

import torch
from torch import Tensor

from trimtab.align.carry import Alignment, Candidates
from trimtab.align.covers import Cover, covers_of
from trimtab.align.cut import HostCut
from trimtab.backends.hf import HFModel
from trimtab.backends.pair import Pair
from trimtab.backends.token_tree import ModelCache, TokenTree, run_tree
from trimtab.errors import ModelError
from trimtab.unembedding import Unembedding
from trimtab.vocab import Vocabulary

MIN_WEIGHT = 5e-3
"""Covers that are less likely than this are passed over."""

DOUBT = 0.03
"""Share of the host's own view in what is carried between vocabularies.

Carrying may be wrong: a token that it rules out is now and then the right one. With the host's
view in both, expert and reference agree on that token, where nothing over nothing would leave a
blend of their ratio without bounds.
"""


class PairProbs(NamedTuple):
    """Probabilities of the candidates, each [contexts, candidates]; each row sums to <= 1."""

    expert: Tensor
    reference: Tensor


@final
class Live:
    """An expert and its reference, asked about a host's next tokens from the same bytes."""

    def __init__(self, pair: Pair, host: HFModel) -> None:
        """Align the pair's tokenizer with the host's."""
        self._pair = pair
        self.alignment = Alignment(pair.reference.strings, host.strings)
        self._rows: dict[int, _Cached] = {}
        self._one_vocabulary = _unpadded(pair.vocabulary) == _unpadded(host.vocabulary)

    @property
    def pair(self) -> Pair:
        """Expert and reference."""
        return self._pair

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
            row: Keep the key-value caches of this row of a generation; then there is one context.

        Raises:
            ModelError: A context is longer than the small models can read.
        """
        reference, vocabulary = self._pair.reference, self._pair.vocabulary
        encode = reference.encode if start is None else reference.encode_following
        start = reference.context_ids() if start is None else start
        if self._one_vocabulary and host_ids is not None:
            ways = [[Cover(tuple(ids), b"")] for ids in host_ids]
        else:
            ways = [covers_of(context, encode, vocabulary) for context in contexts]
        covers = [[cover for cover in found if cover.tokens or start] for found in ways]
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
        return LiveReading(tree, covers, ends, lasts, *self._states(tree, row))

    def score(
        self, reading: "LiveReading", questions: range, host_probs: Tensor, token_ids: Tensor
    ) -> PairProbs:
        """Score candidate host tokens after some contexts under expert and reference.

        Args:
            reading: What `read` gave.
            questions: Which of its contexts.
            host_probs: The host's own probabilities, shape [questions, candidates].
            token_ids: The candidates, shape [candidates].
        """
        candidates = Candidates.of(token_ids, self.alignment.host.vocabulary)
        ways = [
            _Ways(reading, question, self._cut(reading.host_lasts[question], probs, candidates))
            for question, probs in zip(questions, host_probs, strict=True)
        ]
        sides = (
            (reading.expert, self._pair.expert_unembedding),
            (reading.reference, self._pair.reference_unembedding),
        )
        return PairProbs(
            *(self._carry(states, head, ways, host_probs, candidates) for states, head in sides)
        )

    def _cut(
        self, host_last: int | None, host_probs: Tensor, candidates: Candidates
    ) -> HostCut | None:
        if host_last is None or self._one_vocabulary:
            return None
        return HostCut.of(self.alignment.host, host_last, host_probs, candidates)

    def _states(self, tree: TokenTree, row: int | None) -> tuple[Tensor, Tensor]:
        if not tree.tokens:
            return torch.zeros(0, 1), torch.zeros(0, 1)
        cached = None if row is None else self._rows.setdefault(row, _Cached())
        reference = run_tree(self._pair.reference, tree, cached.reference if cached else None)
        with self._pair.as_expert() as expert:
            return run_tree(expert, tree, cached.expert if cached else None), reference

    def _carry(
        self,
        states: Tensor,
        head: Unembedding,
        ways: Sequence["_Ways"],
        host_probs: Tensor,
        candidates: Candidates,
    ) -> Tensor:
        asked = sorted({node for way in ways for node in way.nodes})
        if not asked:
            return host_probs
        with torch.no_grad():
            logprobs = head.logits(states[asked]).float().cpu().log_softmax(-1)
        place = {node: number for number, node in enumerate(asked)}
        carried = torch.zeros_like(host_probs)
        plain: list[tuple[int, Tensor, float]] = []
        for question, way in enumerate(ways):
            weighed = self._weighed(way, logprobs, place)
            if not weighed:
                carried[question] = host_probs[question]
            for cover, probs, weight in weighed:
                if cover.rest:
                    carried[question] += weight * self.alignment.rest_to_host(
                        probs, cover.rest, host_probs[question], candidates
                    )
                else:
                    plain.append((question, probs, weight))
        if plain:
            questions, probs, weights = zip(*plain, strict=True)
            to_host = self.alignment.to_host(
                torch.stack(probs), host_probs[list(questions)], candidates.token_ids
            )
            carried.index_add_(0, torch.tensor(questions), torch.tensor(weights)[:, None] * to_host)
        return carried if self._one_vocabulary else torch.lerp(carried, host_probs, DOUBT)

    def _weighed(
        self, way: "_Ways", logprobs: Tensor, place: dict[int, int]
    ) -> list[tuple[Cover, Tensor, float]]:
        """The covers that matter, with the probabilities of what follows them and their shares.

        None where the text cannot go on after any of them.
        """
        scores, following = [], []
        for cover, end, path in zip(way.covers, way.ends, way.paths, strict=True):
            score = sum(float(logprobs[place[parent], token]) for parent, token in path)
            # What goes on after a cover without a rest is any text, but not the end of one.
            longer = self.alignment.small.longer_than(cover.rest)
            after = logprobs[place[end]]
            if way.cut is not None:
                after = way.cut.leave_out(after, cover.rest, self.alignment.small)
            score += float(after[longer].logsumexp(0)) if len(longer) else -torch.inf
            scores.append(score)
            following.append(after)
        if max(scores, default=-torch.inf) == -torch.inf:
            return []
        shares = torch.tensor(scores, dtype=torch.float64).softmax(0)
        shares = torch.where(shares < MIN_WEIGHT, 0.0, shares)
        shares = (shares / shares.sum()).tolist()
        found = zip(way.covers, following, shares, strict=True)
        return [(cover, after.exp(), share) for cover, after, share in found if share > 0]


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
    """

    tree: TokenTree
    covers: list[list[Cover]]
    ends: list[list[int]]
    host_lasts: Sequence[int | None]
    expert: Tensor
    reference: Tensor

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


def _unpadded(vocabulary: Vocabulary) -> tuple[bytes | None, ...]:
    """Its tokens without the rows that only fill it up, whose number differs in one family."""
    end = len(vocabulary)
    while end and vocabulary.token_bytes[end - 1] is None:
        end -= 1
    return vocabulary.token_bytes[:end]


class _Ways:
    """The covers of one context, with the steps in which they differ."""

    def __init__(self, reading: LiveReading, question: int, cut: HostCut | None) -> None:
        self.covers = reading.covers[question]
        self.ends = reading.ends[question]
        self.cut = cut
        lines = [reading.tree.line(end) for end in self.ends]
        shared = _shared_length(lines)
        tokens = reading.tree.tokens
        self.paths = [
            [(line[i - 1], tokens[line[i]]) for i in range(max(shared, 1), len(line))]
            for line in lines
        ]
        self.nodes = {*self.ends, *(parent for path in self.paths for parent, _ in path)}


def _shared_length(lines: list[list[int]]) -> int:
    if not lines:
        return 0
    shortest = min(len(line) for line in lines)
    for i in range(shortest - 1, -1, -1):
        if len({line[i] for line in lines}) == 1:
            return i + 1
    return 0


@dataclass
class _Cached:
    """What both models keep of a row's last context."""

    reference: ModelCache = field(default_factory=ModelCache)
    expert: ModelCache = field(default_factory=ModelCache)
