"""How likely a steered host finds given continuations: what its `generate` would give them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trimtab.backends.branches import branch_states
from trimtab.backends.hf import HFModel
from trimtab.blend import evidence_weights, mixture_logprobs
from trimtab.steering.evidence import (
    Mixture,
    ReadPrompt,
    Said,
    last_text,
    readable,
    text_before,
    text_ids,
)
from trimtab.steering.field import LOGIT_ROWS
from trimtab.steering.predictors import Rows

PLACES = 16
"""Places in answers whose logits are computed at once: of 262,144 tokens, 17 MB in float32."""


@dataclass(frozen=True)
class AnswerScore:
    """What a host makes of a continuation.

    Attributes:
        logprobs: Of each of its tokens, in nats, shape [tokens].
        is_greedy: Whether each token is the likeliest one at its place.
        alone: What each predictor by itself gives to the whole of it, in nats, shape [predictors].
    """

    logprobs: Tensor
    is_greedy: bool
    alone: Tensor


@torch.no_grad()
def score_answers(
    host: HFModel, mixture: Mixture, context_ids: Sequence[int], answers: Sequence[Sequence[int]]
) -> list[AnswerScore]:
    """Score continuations of one context as `generate` would choose them.

    The context is the prompt: it alone says how far each predictor is trusted, for the answer's
    own words are no evidence (`Mixture.weigh`). Each place is asked by itself, since places that
    are asked together share their candidates. The log-probability of an answer is the sum.

    Args:
        host: The host, a decoder-only model.
        mixture: What steers it.
        context_ids: Tokens that all answers follow, special ones included; at least one.
        answers: Tokens of each answer, at least one each.
    """
    places, states = _places(answers), _read(host, context_ids, answers)
    first = len(context_ids)
    prompt = ReadPrompt(torch.tensor(context_ids), _pieces(host, context_ids), states[0][:first])
    weights = mixture.weigh(host.unembedding, prompt)[:, None]
    logprobs = [list[Tensor]() for _ in answers]
    is_greedy = [True for _ in answers]
    alone = torch.zeros(len(mixture.members), len(answers), dtype=torch.double)
    for place, said in _said(host, mixture, context_ids, places, states):
        # Once: each place is asked for several numbers, and what predictors give is on the CPU too.
        steered = said.mixed(weights)[0].cpu()
        likeliest = int(steered.argmax())
        for number in place.answers:
            token_id = answers[number][len(place.before)]
            logprobs[number].append(steered[token_id].double())
            is_greedy[number] &= likeliest == token_id
            alone[:, number] += said.of_tokens(torch.tensor([token_id]))[:, 0]
    each = zip(logprobs, is_greedy, alone.unbind(1), strict=True)
    return [AnswerScore(torch.stack(nats), greedy, own) for nats, greedy, own in each]


def alternatives_nats(scores: Sequence[AnswerScore], weights: Tensor) -> Tensor:
    """Log-likelihoods of alternatives: together as `generate` has them, each its share of that.

    The shares are the predictors' mixture *given that the answer is one of these*. That it is one
    of a few labels, say, is known, and what a predictor pays for knowing it too says nothing
    about which. An answer that has no alternative keeps its own log-likelihood.

    Args:
        scores: Of the answers to one context.
        weights: Trust in each predictor where answers are told apart, shape [predictors].

    Returns:
        In nats, shape [alternatives].
    """
    together = torch.stack([score.logprobs.sum() for score in scores]).logsumexp(0)
    alone = torch.stack([score.alone for score in scores], 1)
    return together + mixture_logprobs(alone.log_softmax(-1), weights[:, None])


@torch.no_grad()
def answer_evidence(
    host: HFModel, mixture: Mixture, context_ids: Sequence[int], answers: Sequence[Sequence[int]]
) -> Tensor:
    """What each predictor by itself gives to some continuations of one context.

    Args:
        host: The host, a decoder-only model.
        mixture: The predictors; how far they are trusted plays no part.
        context_ids: As for `score_answers`.
        answers: Likewise.

    Returns:
        Log-probabilities of whole answers, in nats, shape [predictors, answers].
    """
    states = _read(host, context_ids, answers)
    found = torch.zeros(len(mixture.members), len(answers), dtype=torch.double)
    for place, said in _said(host, mixture, context_ids, _places(answers), states):
        for number in place.answers:
            token_id = torch.tensor([answers[number][len(place.before)]])
            found[:, number] += said.of_tokens(token_id)[:, 0]
    return found


@torch.no_grad()
def score_text(
    host: HFModel,
    mixture: Mixture,
    token_ids: Sequence[int],
    first: int,
    weights: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Score a text of which each token is, once it is scored, evidence for what follows.

    This is what `evaluate` scores: the likelihood of a document given nothing but itself.

    Args:
        host: The host, a decoder-only model.
        mixture: What steers it.
        token_ids: The text, or a window of it; those before `first` are context.
        first: First token that is scored: at least 1, and one of the text.
        weights: Trust in each predictor at `first`, shape [predictors]; None is the prior.

    Returns:
        Log-probabilities in nats, shape [len(token_ids) - first], and the weights after the last.
    """
    ids, read_ids = torch.tensor(token_ids), token_ids[:-1]
    [states] = branch_states(host, read_ids, [()])
    read = ReadPrompt(ids[:-1], _pieces(host, read_ids), states)
    share, found = mixture.steering.blend.share, []
    weights = mixture.prior if weights is None else weights
    for positions, said in _read_on(host, mixture, read, first - 1):
        logprobs = said.of_tokens(ids[[position + 1 for position in positions]])
        columns = evidence_weights(logprobs, mixture.prior, share=share, start=weights)
        weights = columns[:, -1]
        found.append(mixture_logprobs(logprobs.double(), columns[:, :-1]))
    return torch.cat(found), weights


def _read_on(
    host: HFModel, mixture: Mixture, read: ReadPrompt, first: int
) -> Iterator[tuple[Sequence[int], Said]]:
    """What is said of the token after each position from `first` on, some at a time."""
    asked = range(first, len(read.token_ids))
    for begin in range(0, len(asked), LOGIT_ROWS):
        # Each position's context is all text before it: those of a whole window fill the memory.
        yield from mixture.read(host.unembedding, read, asked[begin : begin + LOGIT_ROWS])


@dataclass(frozen=True)
class _Place:
    """A place in the answers to one context, where some of them go on.

    Attributes:
        before: Tokens of the answer before it.
        answers: Numbers of the answers that begin with these, and go on.
    """

    before: tuple[int, ...]
    answers: tuple[int, ...]


def _places(answers: Sequence[Sequence[int]]) -> list[_Place]:
    """Every place once: alternatives of one token each, above all, have one in common."""
    found: dict[tuple[int, ...], list[int]] = {}
    for number, answer in enumerate(answers):
        for end in range(len(answer)):
            found.setdefault(tuple(answer[:end]), []).append(number)
    return [_Place(before, tuple(numbers)) for before, numbers in found.items()]


def _read(
    host: HFModel, context_ids: Sequence[int], answers: Sequence[Sequence[int]]
) -> list[Tensor]:
    """The host's states of the context with each answer, but for its last token."""
    return branch_states(host, context_ids, [answer[:-1] for answer in answers])


def _said(
    host: HFModel,
    mixture: Mixture,
    context_ids: Sequence[int],
    places: Sequence[_Place],
    states: Sequence[Tensor],
) -> Iterator[tuple[_Place, Said]]:
    """What the predictors say at each place; those of an answer come in its order."""
    read = [torch.tensor([*context_ids, *place.before]) for place in places]
    pieces = [_pieces(host, ids.tolist()) for ids in read]
    contexts = [text_before(each) for each in pieces]
    live, reading = mixture.steering.live, None
    if live is not None:
        each = list(zip(places, read, pieces, strict=True))
        reading = live.read(
            [readable(context) for context in contexts],
            host_ids=[text_ids(ids, texts, 0, len(ids)) for _, ids, texts in each],
            # Where a prompt ends says nothing about how the host would read what follows it.
            host_lasts=[
                last_text(ids, texts, len(ids)) if place.before else None
                for place, ids, texts in each
            ],
        )
    head, last = host.unembedding, len(context_ids) - 1
    ends = [states[place.answers[0]][last + len(place.before)] for place in places]
    for first in range(0, len(places), PLACES):
        # A vocabulary's matrix is read once for several places.
        hidden = torch.stack(ends[first : first + PLACES]).to(head.weight.device)
        logits = head.logits(hidden).float()
        for number in range(first, first + len(hidden)):
            row, own = slice(number - first, number - first + 1), range(number, number + 1)
            questions = ((reading, own),) if reading else ()
            rows = Rows(logits[row], hidden[row], contexts[number : number + 1], questions)
            yield places[number], mixture.said(rows)


def _pieces(host: HFModel, token_ids: Sequence[int]) -> tuple[bytes | None, ...]:
    return tuple(host.vocabulary.token_bytes[i] for i in token_ids)
