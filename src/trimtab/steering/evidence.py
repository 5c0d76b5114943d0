"""What a prompt says about the predictors: how far each is trusted in the text after it."""

import codecs
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trimtab.backends.chat import ChatPrompt
from trimtab.backends.reading import LiveReading
from trimtab.blend import evidence_weights, mixture_logprobs
from trimtab.steering.field import Field, logits_in_chunks
from trimtab.steering.pieces import Pieces, at_once
from trimtab.steering.predictors import Predicted, Rows, Steering, predicted, predicting
from trimtab.steering.rows import prior_of
from trimtab.unembedding import Unembeds

EVIDENCE_TOKENS = 64
"""Last tokens of a prompt that count as evidence: each needs a row of logits, and by then the
evidence has long decided where predictors differ."""


@dataclass(frozen=True)
class ReadPrompt:
    """A prompt that a host has read, without padding.

    Attributes:
        token_ids: Shape [seq].
        token_bytes: Bytes of each token, None for special ones.
        hidden: The host's states, shape [states, hidden], of the last `states` tokens (fewer
            than seq where the first tokens were read by an earlier call).
        chat: Where it is a chat: what is the message, and how the small models read it.
        row: The row of a generation that goes on from it, whose small models need not read it
            again; None where nothing goes on.
    """

    token_ids: Tensor
    token_bytes: tuple[bytes | None, ...]
    hidden: Tensor
    chat: ChatPrompt | None = None
    row: int | None = None

    @property
    def text(self) -> range:
        """Tokens that are the user's: in a chat the message alone."""
        return self.chat.message if self.chat else range(len(self.token_ids))


@dataclass(frozen=True)
class Said:
    """What the predictors of a mixture say of some next tokens.

    Attributes:
        found: What each of them says, and what each memory found.
        stacked: The members' natural-log probabilities over the field,
            [predictors, rows, candidates + 1].
        own: As `Steering.own`.
    """

    found: Predicted
    stacked: Tensor
    own: Tensor | None = None

    @property
    def field(self) -> Field:
        """The tokens that they tell apart."""
        return self.found.field

    def of_tokens(self, token_ids: Tensor) -> Tensor:
        """What each predictor gives to one token a row, shape [predictors, rows]."""
        return self.field.of_tokens(self.stacked, token_ids)

    def mixed(self, weights: Tensor) -> Tensor:
        """The mixture over the vocabulary, [rows, vocab]; weights have shape [predictors, rows]."""
        mixed = self.field.everywhere(mixture_logprobs(self.stacked, weights[..., None]))
        if self.own is None:
            return mixed
        return keep_own(mixed, self.field.everywhere(self.field.logprobs), self.own)


@dataclass(frozen=True)
class Mixture:
    """The predictors that steer a generation, weighed by its prompt.

    Attributes:
        steering: What steers, in one row.
        trust: How far each predictor is trusted, whatever a prompt says, shape [predictors]; None
            where each prompt says it.
    """

    steering: Steering
    trust: Tensor | None = None

    @property
    def members(self) -> tuple[str, ...]:
        """The predictors, the bare host first."""
        return self.steering.families[self.steering.rows[0]]

    @property
    def prior(self) -> Tensor:
        """Trust in each predictor before any evidence, shape [predictors]."""
        return prior_of(self.members, self.steering.blend)

    def weigh(self, unembedding: Unembeds, prompt: ReadPrompt) -> Tensor:
        """How far a prompt itself speaks for each predictor.

        Predictors are weighed by what each gave to the prompt's tokens of text, each given the
        tokens before it (`evidence_weights`). On text that the adapter does not help, the host
        takes over. In a chat the user's message alone is text.

        Args:
            unembedding: The host's.
            prompt: What the host has read.

        Returns:
            Weights that sum to one, shape [predictors]; the prior without evidence.
        """
        return at_once(self.weighing(unembedding, prompt))

    def weighing(
        self, unembedding: Unembeds, prompt: ReadPrompt, few: int | None = None
    ) -> Pieces[Tensor]:
        """As `weigh`, in pieces; `few` is that of `predicting`."""
        if self.trust is not None:
            return self.trust
        asked = evidence_positions(prompt)
        if not asked:
            return self.prior
        scores = yield from self.scoring(unembedding, prompt, asked, few)
        return self.weights_after(scores)

    def scoring(
        self, unembedding: Unembeds, prompt: ReadPrompt, asked: Sequence[int], few: int | None
    ) -> Pieces[Tensor]:
        """What each predictor gives to the tokens after some positions, [predictors, asked].

        Args:
            unembedding: The host's.
            prompt: What the host has read.
            asked: As for `read`, at least one.
            few: As for `predicting`.
        """
        found = yield from self.saying(unembedding, prompt, asked, few)
        return torch.cat([said.of_tokens(tokens_after(prompt, some)) for some, said in found], 1)

    def saying(
        self, unembedding: Unembeds, prompt: ReadPrompt, asked: Sequence[int], few: int | None
    ) -> Pieces[list[tuple[Sequence[int], Said]]]:
        """As `read`, all of it, in pieces; arguments are those of `scoring`."""
        found = []
        for positions, rows in self._rows(unembedding, prompt, asked):
            if rows.questions:
                yield
            predictions = yield from predicting(self.steering, rows, few)
            found.append((positions, self._what_is_said(predictions)))
        return found

    def read_ahead(self, prompt: ReadPrompt) -> None:
        """Let the small models read what is there of a prompt, into the caches of its row.

        Less is then left to read at once when the whole of it is weighed.

        Args:
            prompt: Its first tokens; their states are not needed.
        """
        end = min(len(prompt.token_ids), prompt.text.stop)
        context = text_before(prompt.token_bytes[prompt.text.start : end])
        if context:
            self._read(prompt, [end - 1], [context])

    def weights_after(self, logprobs: Tensor) -> Tensor:
        """Trust in each predictor after a text, shape [predictors].

        Args:
            logprobs: What each gave to each token of the text, shape [predictors, tokens].
        """
        share = self.steering.blend.share
        return evidence_weights(logprobs, self.prior, share=share)[:, -1].float()

    def read(
        self, unembedding: Unembeds, prompt: ReadPrompt, asked: Sequence[int]
    ) -> Iterator[tuple[Sequence[int], Said]]:
        """What the predictors say of the tokens after some positions of a prompt.

        Args:
            unembedding: The host's.
            prompt: What the host has read.
            asked: Positions whose states the prompt has, ascending; may be none.

        Yields:
            Some positions at a time, and what is said of the token after each.
        """
        for positions, rows in self._rows(unembedding, prompt, asked):
            yield positions, self.said(rows)

    def _rows(
        self, unembedding: Unembeds, prompt: ReadPrompt, asked: Sequence[int]
    ) -> Iterator[tuple[Sequence[int], Rows]]:
        """What is asked to be told of the tokens after some positions; as for `read`."""
        if not asked:
            return
        start = prompt.text.start
        contexts = [text_before(prompt.token_bytes[start : p + 1]) for p in asked]
        reading = self._read(prompt, asked, contexts)
        first = len(prompt.token_ids) - len(prompt.hidden)
        places = torch.tensor(asked) - first
        hidden = prompt.hidden[places.to(prompt.hidden.device)]
        for part, logits in logits_in_chunks(unembedding, hidden):
            some = slice(part.start, part.stop)
            questions = ((reading, part),) if reading else ()
            yield asked[some], Rows(logits, hidden[some], contexts[some], questions)

    def said(self, rows: Rows) -> Said:
        """What each predictor says."""
        return self._what_is_said(predicted(self.steering, rows))

    def _what_is_said(self, found: Predicted) -> Said:
        stacked = torch.stack([found.logprobs[name] for name in self.members])
        return Said(found, stacked, self.steering.own)

    def logprobs(self, rows: Rows, weights: Tensor) -> Tensor:
        """The steered distribution: the predictors' mixture.

        Args:
            rows: What is asked.
            weights: Trust in each predictor at each row, shape [predictors, rows].

        Returns:
            Natural-log probabilities, shape [rows, vocab]; tokens that the host's logits forbid
            (-inf) stay forbidden.
        """
        return self.said(rows).mixed(weights)

    def _read(
        self, prompt: ReadPrompt, asked: Sequence[int], contexts: Sequence[bytes]
    ) -> LiveReading | None:
        if self.steering.live is None:
            return None
        ids, pieces, start = prompt.token_ids, prompt.token_bytes, prompt.text.start
        return self.steering.live.read(
            [readable(context) for context in contexts],
            host_ids=[text_ids(ids, pieces, start, position + 1) for position in asked],
            host_lasts=[last_text(ids, pieces, position + 1) for position in asked],
            start=prompt.chat.opening_ids if prompt.chat else None,
            row=prompt.row,
        )


def keep_own(logprobs: Tensor, host_logprobs: Tensor, own: Tensor) -> Tensor:
    """Give some tokens the host's own probability, and leave the others their proportions.

    Args:
        logprobs: Natural-log probabilities, shape [rows, vocab].
        host_logprobs: The host's own, shape [rows, vocab].
        own: True for the tokens that keep the host's probability, shape [vocab]; in each row at
            least one other has some.

    Returns:
        Natural-log probabilities, shape [rows, vocab], that sum to one.
    """
    own = own.to(logprobs.device)
    others = logprobs.masked_fill(own, -torch.inf)
    mass = host_logprobs.masked_fill(own, -torch.inf).logsumexp(-1, keepdim=True)
    scaled = others - others.logsumexp(-1, keepdim=True) + mass
    return torch.where(own, host_logprobs, scaled)


def tokens_after(prompt: ReadPrompt, positions: Sequence[int]) -> Tensor:
    """The tokens after some positions of a prompt, on the CPU."""
    return prompt.token_ids[[position + 1 for position in positions]].cpu()


def evidence_positions(prompt: ReadPrompt) -> list[int]:
    """Positions of which the next token is evidence."""
    first = len(prompt.token_ids) - len(prompt.hidden)
    return [
        position
        for position in range(first, len(prompt.token_ids) - 1)
        if position + 1 in prompt.text and prompt.token_bytes[position + 1]
    ][-EVIDENCE_TOKENS:]


def text_before(token_bytes: Sequence[bytes | None]) -> bytes:
    """The text that tokens stand for; special tokens contribute nothing."""
    return b"".join(text for text in token_bytes if text)


def text_ids(
    token_ids: Tensor, token_bytes: Sequence[bytes | None], start: int, end: int
) -> list[int]:
    """The tokens from start to end that stand for text."""
    part = zip(token_ids[start:end].tolist(), token_bytes[start:end], strict=True)
    return [token_id for token_id, text in part if text]


def last_text(token_ids: Tensor, token_bytes: Sequence[bytes | None], end: int) -> int | None:
    """The token before `end`, if it stands for text."""
    return int(token_ids[end - 1]) if end and token_bytes[end - 1] else None


def readable(context: bytes) -> bytes:
    """Replace bytes that are not UTF-8, which a host may write and a tokenizer cannot read.

    A character that the end cuts stays cut: its other bytes may follow.
    """
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    return decoder.decode(context).encode() + decoder.getstate()[0]
