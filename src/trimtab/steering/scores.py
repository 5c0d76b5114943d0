"""The steered scores of a host's next tokens, for one call of its `generate`."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, final

import torch
from torch import Tensor, nn
from transformers import LogitsProcessor

from trimtab.align.strings import token_lengths
from trimtab.backends.chat import ChatPrompt
from trimtab.backends.hf import HFModel
from trimtab.backends.reading import LiveReading, RowText
from trimtab.errors import ModelError
from trimtab.steering.drafting import Written
from trimtab.steering.evidence import (
    Mixture,
    ReadPrompt,
    last_text,
    readable,
    text_before,
    text_ids,
)
from trimtab.steering.predictors import Rows


@final
class Trace:
    """Keeps the final hidden states that a model computes while a generation runs."""

    def __init__(self) -> None:
        """Keep nothing yet."""
        self._parts: list[Tensor] | None = None

    @contextmanager
    def running(self) -> Iterator[None]:
        """Keep states inside the context."""
        self._parts = []
        try:
            yield
        finally:
            self._parts = None

    def hook(self, module: nn.Module, args: Any, output: Any) -> None:
        """Forward hook of the model's trunk."""
        del module, args
        if self._parts is not None:
            self._parts.append(output[0].detach())

    def take(self) -> Tensor:
        """States since the last call, shape [rows, seq, hidden]: one, or all of a prompt."""
        parts, self._parts = self._parts or [], []
        return torch.cat(parts, 1)


@final
class SteeringProcessor(LogitsProcessor):
    """Replaces the host's scores by steered log-probabilities, for one call of `generate`."""

    def __init__(
        self,
        host: HFModel,
        mixture: Mixture,
        trace: Trace,
        mask: Tensor | None,
        chats: Sequence[ChatPrompt] = (),
    ) -> None:
        """Prepare for prompts with this attention mask, shape [prompts, seq], if there is one."""
        self._host = host
        self._mixture = mixture
        self._trace = trace
        self._mask = mask
        self._chats = chats
        self._is_text = token_lengths(host.vocabulary) > 0
        self._prompt_tokens = 0
        self._weights: Tensor | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Steer the scores, shape [rows, vocab], of the tokens after input_ids [rows, seq].

        Tokens that other processors have forbidden stay so.
        """
        states = self._trace.take()
        rows = self._rows(input_ids)
        spelled = [self._spelled(row.tolist()) for row in rows]
        if self._weights is None:
            self._prompt_tokens = input_ids.shape[1]
            self._chats = _chat_of_each(self._host, self._chats, rows)
            prompts = [
                ReadPrompt(row, text, state[-len(row) :], chat, number)
                for number, (row, text, state, chat) in enumerate(
                    zip(rows, spelled, states, self._chats or [None] * len(rows), strict=True)
                )
            ]
            self._weights = self._weigh(prompts)
        if self._is_forced(scores):
            return scores
        contexts, questions = self._read(rows, spelled, input_ids.shape[1] - self._prompt_tokens)
        asked = Rows(scores.float(), states[:, -1], contexts, questions, strangers=True)
        return self._mixture.logprobs(asked, self._weights)

    def block(self, input_ids: Tensor, scores: Sequence[Tensor]) -> Iterator[Tensor]:
        """Steer the scores, each [1, vocab], of the last places of one row [1, seq].

        The last of the places is the one after input_ids. Each gets what a call of its own would
        have given it, except for the rounding of matrix products.

        Yields:
            The scores of one place after another, [1, vocab], each computed when it is asked for:
            those after a draft that is refused never are.
        """
        weights = self._weights
        if weights is None:
            return iter((self(input_ids, *scores),))
        states = self._trace.take()[0, -len(scores) :]
        row = input_ids[0].cpu()
        text = self._spelled(row.tolist())
        ends = range(len(row) - len(scores) + 1, len(row) + 1)
        each = self._written(row, text, ends)
        questions = self._ask_block(each, [last_text(row, text, end) for end in ends])
        places = zip(scores, states.split(1), each, questions, strict=True)
        # One by one: rows that are asked together share their candidates.
        return (
            one
            if self._is_forced(one)
            else self._mixture.logprobs(
                Rows(one.float(), state, (place.said + place.context,), question), weights
            )
            for one, state, place, question in places
        )

    def outgrown(self, input_ids: Tensor) -> list[int]:
        """Rows [rows, seq] of a generation that has begun which the expert can read no further."""
        live = self._mixture.steering.live
        if live is None or live.pair.reference.max_tokens is None:
            return []
        rows = self._rows(input_ids)
        spelled = [self._spelled(row.tolist()) for row in rows]
        texts = self._small_texts(rows, spelled, input_ids.shape[1] - self._prompt_tokens)
        return [number for number, text in enumerate(texts) if not live.can_read(text)]

    def written(self, input_ids: Tensor) -> Written:
        """What the expert is to go on from, of one row [1, seq] of a generation that has begun."""
        row = input_ids[0].cpu()
        text = self._spelled(row.tolist())
        return self._written(row, text, range(len(row), len(row) + 1))[0]

    def _written(
        self, row: Tensor, text: Sequence[bytes | None], ends: Sequence[int]
    ) -> list[Written]:
        """What stands before some ends, ascending, of one row and its bytes."""
        start = self._prompt_tokens if self._chats else 0
        small = self._chats[0].small_ids if self._chats else None
        message = self._chats[0].message if self._chats else range(0)
        said = text_before(text[message.start : message.stop])
        context, ids, found = b"", list[int](), list[Written]()
        for end in ends:
            context += text_before(text[start:end])
            ids = [*ids, *text_ids(row, text, start, end)]
            found.append(Written(context, ids, small, said))
            start = end
        return found

    def _is_forced(self, scores: Tensor) -> bool:
        """Whether there is nothing to steer: a token that is no text is forced, in all rows.

        Such as the language that a target begins with.
        """
        self._is_text = self._is_text.to(scores.device)
        tops, likeliest = scores.max(-1)
        if bool((self._is_text[likeliest] & (tops > -torch.inf)).any()):
            return False
        return bool(scores.masked_fill(~self._is_text, -torch.inf).amax() == -torch.inf)

    def _spelled(self, token_ids: Sequence[int]) -> tuple[bytes | None, ...]:
        """The bytes of each token; of a target without the space that its tokenizer puts first."""
        vocabulary = self._host.vocabulary
        pieces = [vocabulary.token_bytes[i] for i in token_ids]
        first = next((place for place, piece in enumerate(pieces) if piece), None)
        if self._host.is_encoder_decoder and vocabulary.prefix_space and first is not None:
            pieces[first] = (pieces[first] or b"").removeprefix(b" ")
        return tuple(pieces)

    def _read(
        self, rows: Sequence[Tensor], spelled: Sequence[Sequence[bytes | None]], new_tokens: int
    ) -> tuple[tuple[bytes, ...], tuple[tuple[LiveReading, range], ...]]:
        """The text before each row's next token, and how the expert has read it."""
        contexts = tuple(
            text_before(text[chat.message.start : chat.message.stop])
            + text_before(text[len(text) - new_tokens :])
            if chat
            else text_before(text)
            for text, chat in zip(spelled, self._chat_of(len(rows)), strict=True)
        )
        live = self._mixture.steering.live
        if live is None:
            return contexts, ()
        texts = self._small_texts(rows, spelled, new_tokens)
        if new_tokens:
            # Rows that have ended are asked with the others, and nothing comes of what is said.
            texts = [
                text if live.can_read(text) else RowText(text.row, b"", (), start=text.start)
                for text in texts
            ]
        return contexts, tuple((reading, range(1)) for reading in live.read_rows(texts))

    def _small_texts(
        self, rows: Sequence[Tensor], spelled: Sequence[Sequence[bytes | None]], new_tokens: int
    ) -> list[RowText]:
        """What the small models are to read: row i continues row i of the call before."""
        texts = []
        for row, text, chat in zip(rows, spelled, self._chat_of(len(rows)), strict=True):
            start = len(text) - new_tokens if chat else 0
            # Where a prompt ends says nothing about how the host would read what follows it.
            last = last_text(row, text, len(text)) if new_tokens else None
            answer, ids = readable(text_before(text[start:])), text_ids(row, text, start, len(text))
            texts.append(RowText(len(texts), answer, ids, last, chat.small_ids if chat else None))
        return texts

    def _chat_of(self, rows: int) -> Sequence[ChatPrompt | None]:
        """What each row answers: a prompt's sequences, or its beams, follow each other."""
        if not self._chats:
            return [None] * rows
        return [chat for chat in self._chats for _ in range(rows // len(self._chats))]

    def _ask_block(
        self, places: Sequence[Written], host_lasts: Sequence[int | None]
    ) -> list[tuple[tuple[LiveReading, range], ...]]:
        """Let the expert read several places of row 0 at once: each goes on from the one before."""
        live = self._mixture.steering.live
        if live is None:
            return [()] * len(places)
        reading = live.read(
            [readable(place.context) for place in places],
            host_ids=[place.host_ids for place in places],
            host_lasts=host_lasts,
            start=places[0].start,
            row=0,
        )
        return [((reading, range(number, number + 1)),) for number in range(len(places))]

    def _rows(self, input_ids: Tensor) -> list[Tensor]:
        """Token ids of each row without the padding of its prompt."""
        ids = input_ids.cpu()
        if self._mask is None:
            return list(ids)
        # Beams and several sequences of one prompt follow each other.
        mask = self._mask.cpu().bool().repeat_interleave(len(ids) // len(self._mask), 0)
        new = torch.ones(len(ids), ids.shape[1] - mask.shape[1], dtype=torch.bool)
        return [row[kept] for row, kept in zip(ids, torch.cat([mask, new], 1), strict=True)]

    def _weigh(self, prompts: Sequence[ReadPrompt]) -> Tensor:
        """Trust in each predictor by each prompt, shape [predictors, prompts]."""
        live = self._mixture.steering.live
        if live:
            # A batch before may have had more rows.
            live.forget_from(len(prompts))
        keys = [tuple(prompt.token_ids.tolist()) for prompt in prompts]
        known: dict[tuple[int, ...], Tensor] = {}
        for row, (key, prompt) in enumerate(zip(keys, prompts, strict=True)):
            if key not in known:
                known[key] = self._mixture.weigh(self._host.unembedding, prompt)
            elif live:
                live.branch(keys.index(key), [row])
        return torch.stack([known[key] for key in keys], 1)


def _chat_of_each(
    host: HFModel, chats: Sequence[ChatPrompt], rows: Sequence[Tensor]
) -> Sequence[ChatPrompt]:
    """What each row answers, where these are chats: a prompt's rows follow each other."""
    each = [chat for chat in chats for _ in range(len(rows) // len(chats))]
    # The rows of an encoder-decoder are answers alone.
    same = host.is_encoder_decoder or all(
        list(chat.token_ids) == row.tolist() for chat, row in zip(each, rows, strict=False)
    )
    if chats and not (same and len(each) == len(rows)):
        raise ModelError(
            f"generate was given other prompts than the {len(chats)} messages under the chat"
            f" template of {host.ref}",
            hint="give it one prompt a message, in order, up to where the answer begins",
        )
    return each
