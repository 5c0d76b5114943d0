"""How likely a steered host finds given continuations: what its `generate` would give them."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trimtab.backends.hf import HFModel
from trimtab.backends.live import LiveReading
from trimtab.blend import evidence_weights, mixture_logprobs
from trimtab.steering.evidence import (
    Mixture,
    ReadPrompt,
    last_text,
    readable,
    text_before,
    text_ids,
)
from trimtab.steering.field import CHUNK_ROWS
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
    prompt = ReadPrompt(
        torch.tensor(context_ids),
        tuple(host.vocabulary.token_bytes[i] for i in context_ids),
        states[0][: len(context_ids)],
    )
    weights = mixture.weigh(host.unembedding, prompt)[:, None]
    return [
        _scored(mixture, weights, _Text(host, [*context_ids, *answer], len(context_ids)), row)
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
        first: First token that is scored, at least 1.
        weights: Trust in each predictor at `first`, shape [predictors]; None is the prior.

    Returns:
        Log-probabilities in nats, shape [len(token_ids) - first], and the weights after the last.
    """
    text, found = _Text(host, token_ids, 0), []
    states = _states(host, [token_ids[:-1]])[0]
    blend = mixture.steering.blend
    for begin in range(first, len(token_ids), CHUNK_ROWS):
        places = range(begin, min(begin + CHUNK_ROWS, len(token_ids)))
        rows = text.rows(mixture, states, places)
        said = mixture.said(rows)
        logprobs = said.of_tokens(torch.tensor(token_ids[places.start : places.stop]))
        columns = evidence_weights(logprobs, mixture.prior, share=blend.share, start=weights)
        weights = columns[:, -1]
        found.append(mixture_logprobs(logprobs.double(), columns[:, :-1]))
    last = mixture.prior if weights is None else weights
    return torch.cat(found) if found else torch.zeros(0), last


class _Text:
    """A text in a host's tokens, and what is asked at its places."""

    def __init__(self, host: HFModel, token_ids: Sequence[int], prompt_tokens: int) -> None:
        self._host = host
        self._ids = torch.tensor(token_ids)
        self._pieces = tuple(host.vocabulary.token_bytes[i] for i in token_ids)
        self.prompt_tokens = prompt_tokens

    @property
    def token_ids(self) -> Tensor:
        """All tokens."""
        return self._ids

    def rows(self, mixture: Mixture, states: Tensor, places: range) -> Rows:
        """What is asked for the tokens at some places, given the states of those before them."""
        contexts = [text_before(self._pieces[:place]) for place in places]
        head = self._host.unembedding
        with torch.inference_mode():
            hidden = states[places.start - 1 : places.stop - 1].to(head.weight.device)
            logits = head.logits(hidden).float()
        reading = self.read(mixture, contexts, places)
        questions = ((reading, range(len(places))),) if reading else ()
        return Rows(logits, hidden, contexts, questions)

    def read(
        self, mixture: Mixture, contexts: Sequence[bytes], places: range
    ) -> LiveReading | None:
        """Let the expert read what stands before each place, where there is one."""
        if mixture.steering.live is None:
            return None
        ids, pieces = self._ids, self._pieces
        # Where a prompt ends says nothing about how the host would read what follows it.
        lasts = [
            None if place == self.prompt_tokens else last_text(ids, pieces, place)
            for place in places
        ]
        return mixture.steering.live.read(
            [readable(context) for context in contexts],
            host_ids=[text_ids(ids, pieces, 0, place) for place in places],
            host_lasts=lasts,
        )


def _scored(mixture: Mixture, weights: Tensor, text: _Text, states: Tensor) -> AnswerScore:
    places = range(text.prompt_tokens, len(text.token_ids))
    rows = text.rows(mixture, states, places)
    logprobs, likeliest = [], []
    for number, token_id in enumerate(text.token_ids[places.start :].tolist()):
        questions = tuple((reading, range(number, number + 1)) for reading, _ in rows.questions)
        one = slice(number, number + 1)
        asked = Rows(rows.logits[one], rows.hidden[one], rows.contexts[one], questions)
        steered = mixture.logprobs(asked, weights)[0]
        logprobs.append(steered[token_id].double())
        likeliest.append(int(steered.argmax()) == token_id)
    return AnswerScore(torch.stack(logprobs), all(likeliest))


def _states(host: HFModel, rows: Sequence[Sequence[int]]) -> list[Tensor]:
    """The host's states of each row, which are run as one batch, padded on the right."""
    longest = max(len(row) for row in rows)
    # What stands on the right of a token changes nothing for a decoder: no mask is needed.
    padded = torch.tensor([[*row, *[row[-1]] * (longest - len(row))] for row in rows])
    with torch.inference_mode():
        states = host.hidden(padded.to(host.device))
    return [found[: len(row)] for found, row in zip(states, rows, strict=True)]
