"""What every way of steering pays for a text, token by token, in one pass of the host."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from trimtab.backends.hf import HFModel
from trimtab.backends.live import Live
from trimtab.backends.reading import OwnReading
from trimtab.blend import evidence_weights, mixture_logprobs
from trimtab.steering.field import Field, logits_in_chunks
from trimtab.steering.predictors import Rows, Steering, predicted
from trimtab.steering.rows import present, prior_of
from trimtab.text.corpus import scored_windows


@dataclass(frozen=True)
class RowScore:
    """What a row makes of a document's tokens.

    Attributes:
        logprobs: Of each token, in nats, shape [tokens].
        top_ids: The row's likeliest token at each place, shape [tokens].
        top_logprobs: How likely the row finds it, shape [tokens].
    """

    logprobs: Tensor
    top_ids: Tensor
    top_logprobs: Tensor


@dataclass(frozen=True)
class ScoredDocument:
    """A document under every row.

    Attributes:
        token_ids: The scored host tokens.
        sizes: Bytes of each.
        rows: By name.
        own: The text as the small models have read it by themselves, where they ran beside the host
            and one window held all of it.
    """

    token_ids: tuple[int, ...]
    sizes: tuple[int, ...]
    rows: Mapping[str, RowScore]
    own: OwnReading | None = None


def score_document(
    host: HFModel,
    text: str,
    steering: Steering,
    *,
    window_tokens: int,
    stride_tokens: int,
    source: str | None = None,
) -> ScoredDocument:
    """Score a document under every row.

    Args:
        host: The host.
        text: The document.
        steering: What may steer it, and the rows.
        window_tokens: Window of the measurement.
        stride_tokens: New tokens a window.
        source: What an encoder-decoder reads before it writes the document; its first token is
            then scored too.
    """
    ids = host.encode(text)
    read_source = None if source is None else torch.tensor([host.encode_source(source)])
    begin = 1 if source is None else 0
    pieces = [host.vocabulary.token_bytes[i] or b"" for i in ids]
    if host.vocabulary.prefix_space and pieces:
        # The space that such a tokenizer puts first is not in the text that others read.
        pieces[0] = pieces[0][1:]
    scorer, own = _Scorer(steering), None
    for window in scored_windows(len(ids), window_tokens, stride_tokens, first=begin):
        context = host.context_ids()
        read = torch.tensor([context + ids[window.start : window.end]], device=host.device)
        with torch.inference_mode():
            said = host.read(read, encoder_ids=read_source, last=window.end - window.score_from + 1)
        skip = len(context) - window.start
        scored = range(window.score_from, window.end)
        is_whole = window.start == 0 and window.end == len(ids)
        reads_own = is_whole and _reads_own(steering.live, text, pieces, window_tokens)
        ends = range(scored.start, scored.stop + reads_own)
        before = list(_contexts(pieces, window.start, ends.start, ends.stop))
        reading = None
        if steering.live:
            seen = [ids[window.start : position] for position in ends]
            lasts = [ids[position - 1] if position else None for position in ends]
            reading = steering.live.read(before, host_ids=seen, host_lasts=lasts)
            own = reading.own(len(scored)) if reads_own else None
        hidden = said.hidden[0, scored.start - 1 + skip : scored.stop - 1 + skip]
        logits_of = None if said.logits is None else said.logits[0, :-1]
        targets = torch.tensor(ids[scored.start : scored.stop])
        with torch.inference_mode():
            for asked, logits in logits_in_chunks(host.unembedding, hidden, logits_of):
                some = slice(asked.start, asked.stop)
                questions = ((reading, asked),) if reading else ()
                scorer.score(Rows(logits, hidden[some], before[some], questions), targets[some])
    sizes = tuple(len(piece) for piece in pieces[begin:])
    return ScoredDocument(tuple(ids[begin:]), sizes, scorer.result(), own)


def _reads_own(live: Live | None, text: str, pieces: Sequence[bytes], window_tokens: int) -> bool:
    """Whether the small models can read a whole text beside the host as they do by themselves."""
    if live is None or b"".join(pieces) != text.encode():
        return False
    reference = live.pair.reference
    size, longest = len(reference.encode(text)), reference.max_tokens
    has_room = longest is None or size + len(reference.context_ids()) <= longest
    return size <= window_tokens and has_room


def _contexts(pieces: Sequence[bytes], start: int, first: int, last: int) -> Iterator[bytes]:
    before = b"".join(pieces[start:first])
    for position in range(first, last):
        yield before
        before += b"".join(pieces[position : position + 1])


@final
class _Scorer:
    """Scores a document chunk by chunk, and weighs predictors by what came before."""

    def __init__(self, steering: Steering) -> None:
        self._steering = steering
        self._weights: dict[str, Tensor] = {}
        self._parts: dict[str, list[RowScore]] = {}

    def score(self, rows: Rows, targets: Tensor) -> None:
        """Score the next tokens, shape [rows]."""
        found = predicted(self._steering, rows)
        field, dense = found.field, found.logprobs
        for row, names in self._steering.families.items():
            members = present(row, names, dense)
            if members:
                stacked = torch.stack([dense[name] for name in members])
                self._parts.setdefault(row, []).append(
                    self._mixed(row, members, field, stacked, targets)
                )

    def _mixed(
        self, row: str, members: Sequence[str], field: Field, stacked: Tensor, targets: Tensor
    ) -> RowScore:
        logprobs = field.of_tokens(stacked, targets)
        blend, start = self._steering.blend, self._weights.get(row)
        prior = prior_of(members, blend)
        weights = evidence_weights(logprobs, prior, share=blend.share, start=start)
        self._weights[row], weights = weights[:, -1], weights[:, :-1]
        mixed = mixture_logprobs(stacked, weights[..., None])
        top = mixed[:, :-1].max(-1)
        scores = mixture_logprobs(logprobs.double(), weights)
        return RowScore(scores, field.token_ids[top.indices], top.values)

    def result(self) -> dict[str, RowScore]:
        """All rows that were scored."""
        names = ("logprobs", "top_ids", "top_logprobs")
        return {
            row: RowScore(*(torch.cat([getattr(part, name) for part in parts]) for name in names))
            for row, parts in self._parts.items()
        }
