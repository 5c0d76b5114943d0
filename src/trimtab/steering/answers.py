"""How likely a steered host finds given continuations: what its `generate` would give them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

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


@dataclass(frozen=True)
class AnswerScore:
    """What a host makes of a continuation.

    Attributes:
        logprobs: Of each of its tokens, in nats, shape [tokens].
        is_greedy: Whether each token is the likeliest one at its place.
    """

    logprobs: Tensor
    is_greedy: bool


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
    states = _states(host, [[*context_ids, *answer[:-1]] for answer in answers])
    first = len(context_ids)
    prompt = ReadPrompt(torch.tensor(context_ids), _pieces(host, context_ids), states[0][:first])
    weights = mixture.weigh(host.unembedding, prompt)[:, None]
    return [
        _scored(host, mixture, weights, [*context_ids, *answer], first, row)
        for answer, row in zip(answers, states, strict=True)
    ]


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
    read = ReadPrompt(ids[:-1], _pieces(host, read_ids), _states(host, [read_ids])[0])
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


def _scored(
    host: HFModel,
    mixture: Mixture,
    weights: Tensor,
    token_ids: Sequence[int],
    first: int,
    states: Tensor,
) -> AnswerScore:
    """Score the tokens from `first` on, given the states of all but the last."""
    ids, pieces, head = torch.tensor(token_ids), _pieces(host, token_ids), host.unembedding
    ends = range(first, len(token_ids))
    contexts = [text_before(pieces[:end]) for end in ends]
    hidden = states[first - 1 :].to(head.weight.device)
    logits = head.logits(hidden).float()
    live, reading = mixture.steering.live, None
    if live is not None:
        reading = live.read(
            [readable(context) for context in contexts],
            host_ids=[text_ids(ids, pieces, 0, end) for end in ends],
            # Where a prompt ends says nothing about how the host would read what follows it.
            host_lasts=[None, *(last_text(ids, pieces, end) for end in ends[1:])],
        )
    logprobs, likeliest = [], []
    for number, token_id in enumerate(token_ids[first:]):
        one = slice(number, number + 1)
        questions = ((reading, range(number, number + 1)),) if reading else ()
        asked = Rows(logits[one], hidden[one], contexts[one], questions)
        steered = mixture.logprobs(asked, weights)[0]
        logprobs.append(steered[token_id].double())
        likeliest.append(int(steered.argmax()) == token_id)
    return AnswerScore(torch.stack(logprobs), all(likeliest))


def _pieces(host: HFModel, token_ids: Sequence[int]) -> tuple[bytes | None, ...]:
    return tuple(host.vocabulary.token_bytes[i] for i in token_ids)


def _states(host: HFModel, rows: Sequence[Sequence[int]]) -> list[Tensor]:
    """The host's states of each row, which are run as one batch, padded on the right."""
    longest = max(len(row) for row in rows)
    # What stands on the right of a token changes nothing for a decoder: no mask is needed.
    padded = torch.tensor([[*row, *[row[-1]] * (longest - len(row))] for row in rows])
    with torch.inference_mode():
        states = host.hidden(padded.to(host.device))
    return [found[: len(row)] for found, row in zip(states, rows, strict=True)]
