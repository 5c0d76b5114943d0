"""Carries what a small model says after each way of reading a context to a host's tokens.

A host token may be longer than the small model's next one. Which of several it is, the small model
says only one token later, and where that matters it is asked once more.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from trimtab.align.candidates import Candidates
from trimtab.align.carry import Alignment
from trimtab.align.covers import Cover
from trimtab.align.follow import after_token, rest_to_host, undecided

MAX_ASKED = 2
"""Likeliest small tokens after each cover of which it may be asked what follows them."""

MIN_UNDECIDED = 0.02
"""Least probability that such a token must leave undecided among host tokens."""

LEAST_ASKED_SHARE = 0.05
"""Covers that are less likely are not asked to tell one host token from others."""


@dataclass(frozen=True)
class Reply:
    """What a small model says after one way of reading a context.

    Attributes:
        cover: The way.
        node: Its last token in the tree; of a way that is not in it, which has a rest, the token
            before.
        probs: Over the next small tokens, shape [vocab]; they sum to one at most.
        share: How likely this way is, among those of the context.
    """

    cover: Cover
    node: int
    probs: Tensor
    share: float

    def likeliest(self, count: int, least: float) -> list[tuple[float, int]]:
        """The likeliest next tokens with their probability, this way's share included.

        None where the next token repeats a rest of the context: it is followed by its string.

        Args:
            count: Most tokens.
            least: Least probability, above 0: few tokens are left to be sorted.
        """
        if self.cover.rest:
            return []
        probs = (self.share / float(self.probs.sum().clamp_min(1e-30))) * self.probs
        token_ids = torch.nonzero(probs >= least)[:, 0]
        top = probs[token_ids].topk(min(count, len(token_ids)))
        return list(zip(top.values.tolist(), token_ids[top.indices].tolist(), strict=True))


class Asked(NamedTuple):
    """A token after which a small model is asked once more: after which node of which context."""

    question: int
    node: int
    token_id: int


Told = dict[tuple[int, int], dict[int, Tensor]]
"""By question and node, by small token: its shares of the candidates, each [candidates]."""


def still_undecided(
    alignment: Alignment,
    replies: Sequence[Sequence[Reply]],
    host_probs: Tensor,
    candidates: Candidates,
) -> list[Asked]:
    """Likely small tokens of which the host does not know which of its tokens they begin.

    Args:
        alignment: Of both vocabularies.
        replies: Of one model, for each context.
        host_probs: The host's own over the candidates, shape [contexts, candidates].
        candidates: The candidates.
    """
    return [
        Asked(question, reply.node, token_id)
        for question, of_question in enumerate(replies)
        for reply in of_question
        for prob, token_id in reply.likeliest(MAX_ASKED, MIN_UNDECIDED)
        if prob * undecided(alignment, token_id, host_probs[question], candidates) >= MIN_UNDECIDED
    ]


def asked_to_tell(
    alignment: Alignment, replies: Sequence[Sequence[Reply]], told_apart: Sequence[int]
) -> list[Asked]:
    """Small tokens that are to be asked about so that some host tokens can be told apart.

    Args:
        alignment: Of both vocabularies.
        replies: Of one model, for each context.
        told_apart: One host token for each context, or none at all.
    """
    if not told_apart:
        return []
    firsts = alignment.first_small(torch.tensor(told_apart)).tolist()
    return [
        Asked(question, reply.node, first)
        for question, (first, of_question) in enumerate(zip(firsts, replies, strict=True))
        for reply in of_question
        if first >= 0 and not reply.cover.rest and reply.share >= LEAST_ASKED_SHARE
    ]


def numbered_through(asked: Sequence[Sequence[Asked]], sizes: Sequence[int]) -> list[Asked]:
    """What parts have asked as one part's, whose contexts are all of theirs, one after another.

    Args:
        asked: By part.
        sizes: Contexts of each part.
    """
    starts = accumulate(sizes[:-1], initial=0)
    return [
        one._replace(question=start + one.question)
        for start, of_part in zip(starts, asked, strict=True)
        for one in of_part
    ]


def dealt(
    probs: Tensor,
    leaves: Sequence[Sequence[tuple[int, int]]],
    asked: Sequence[Sequence[Asked]],
) -> list[list[Tensor]]:
    """To each part what it has asked, of what was said after all parts' leaves.

    Args:
        probs: A model's probabilities after the leaves, shape [all leaves, vocab].
        leaves: By part, each a node and the token after it.
        asked: By part.

    Returns:
        By part, probabilities of shape [vocab].
    """
    found = probs.split([len(some) for some in leaves])
    return [
        [told[some.index((one.node, one.token_id))] for one in of_part]
        for of_part, some, told in zip(asked, leaves, found, strict=True)
    ]


def deal_out(
    alignment: Alignment,
    asked: Sequence[Asked],
    probs: Sequence[Tensor],
    host_probs: Tensor,
    candidates: Candidates,
) -> Told:
    """How the tokens that were asked about are dealt out to the candidates.

    Args:
        alignment: Of both vocabularies.
        asked: The tokens.
        probs: Over the small tokens after each of them, each of shape [vocab of small].
        host_probs: The host's own over the candidates, shape [contexts, candidates].
        candidates: The candidates.
    """
    told: Told = {}
    for (question, node, token_id), after in zip(asked, probs, strict=True):
        told.setdefault((question, node), {})[token_id] = after_token(
            alignment, token_id, after, host_probs[question], candidates
        )
    return told


def carry_replies(
    alignment: Alignment,
    replies: Sequence[Sequence[Reply]],
    told: Told,
    host_probs: Tensor,
    candidates: Candidates,
) -> Tensor:
    """A small model's distributions over the candidates; the host's own where it says nothing.

    Args:
        alignment: Of both vocabularies.
        replies: Of one model, for each context.
        told: What it has said when it was asked once more.
        host_probs: The host's own over the candidates, shape [contexts, candidates].
        candidates: The candidates.

    Returns:
        Shape [contexts, candidates]; what is missing to one belongs to other tokens.
    """
    carried = torch.zeros_like(host_probs)
    plain: list[tuple[int, Reply]] = []
    for question, of_question in enumerate(replies):
        if not of_question:
            carried[question] = host_probs[question]
        for reply in of_question:
            if reply.cover.rest:
                carried[question] += reply.share * rest_to_host(
                    alignment, reply.probs, reply.cover.rest, host_probs[question], candidates
                )
            else:
                plain.append((question, reply))
    if not plain:
        return carried
    questions = [question for question, _ in plain]
    to_host = alignment.to_host(
        torch.stack([reply.probs for _, reply in plain]),
        host_probs[questions],
        candidates.token_ids,
        [told.get((question, reply.node), {}) for question, reply in plain],
    )
    shares = torch.tensor([reply.share for _, reply in plain])
    return carried.index_add(0, torch.tensor(questions), shares[:, None] * to_host)
