"""Documents packed into windows of equal length, with what a loss may count. Pure."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor


@dataclass(frozen=True)
class TokenisedDocument:
    """One document as the model reads it, context and end tokens included.

    Attributes:
        token_ids: One or more ids.
        counted: Which of them a loss counts when they are predicted.
        text_bytes: Bytes of text that each id stands for; 0 for special tokens.
    """

    token_ids: Sequence[int]
    counted: Sequence[bool]
    text_bytes: Sequence[int]


@dataclass(frozen=True)
class Windows:
    """Training windows; the token in a column is predicted from the columns before it.

    Attributes:
        token_ids: Shape [windows, seq].
        position_ids: Positions that start again at each document, by which transformers keeps
            packed documents from attending to each other, shape [windows, seq].
        counted: Which tokens are targets; never the first column, shape [windows, seq].
        text_bytes: Bytes of text of each token, shape [windows, seq].
    """

    token_ids: Tensor
    position_ids: Tensor
    counted: Tensor
    text_bytes: Tensor

    def __len__(self) -> int:
        """Number of windows."""
        return len(self.token_ids)

    def rows(self, index: Tensor | slice) -> "Windows":
        """Choose windows by number, shape [chosen], or by a slice."""
        return Windows(*(getattr(self, field.name)[index] for field in fields(self)))

    def to(self, device: torch.device) -> "Windows":
        """The same windows on a device."""
        return Windows(*(getattr(self, field.name).to(device) for field in fields(self)))

    def scored(self) -> "Windows":
        """Count only targets that stand for text, as a measurement in bits per byte must."""
        return Windows(
            self.token_ids,
            self.position_ids,
            self.counted & (self.text_bytes > 0),
            self.text_bytes,
        )


def counted_by_spans(
    pieces: Sequence[bytes], spans: Iterable[tuple[int, int]], text: str, *, offset_bytes: int = 0
) -> list[bool]:
    """Tell which tokens overlap the spans of a text that a loss counts.

    A token that straddles a span's edge counts: leaving it out would leave the first or last
    letter of a completion untrained.

    Args:
        pieces: The bytes of each token; joined, they are offset_bytes bytes and then the text.
        spans: Character ranges [start, end); none means that all tokens count.
        text: The text.
        offset_bytes: Bytes before the text (SentencePiece's dummy prefix).

    Returns:
        One boolean a token.

    Raises:
        ValueError: The pieces are not the text.
    """
    spans = list(spans)
    if not spans:
        return [True] * len(pieces)
    encoded = text.encode()
    if b"".join(pieces)[offset_bytes:] != encoded:
        raise ValueError("the tokens' bytes are not the text")
    inside = torch.zeros(offset_bytes + len(encoded) + 1, dtype=torch.long)
    for start, end in spans:
        before = offset_bytes + len(text[:start].encode())
        inside[before : before + len(text[start:end].encode())] = 1
    total = torch.cat([torch.zeros(1, dtype=torch.long), inside.cumsum(0)])
    ends = torch.tensor([len(piece) for piece in pieces]).cumsum(0)
    starts = torch.cat([torch.zeros(1, dtype=torch.long), ends[:-1]])
    return (total[ends] > total[starts]).tolist()


def pack(
    documents: Sequence[TokenisedDocument],
    *,
    window_tokens: int,
    context_ids: Sequence[int] = (),
    padding_id: int = 0,
) -> Windows:
    """Lay documents end to end and cut them into windows.

    Each window repeats the last token of the one before, so that every token is predicted
    exactly once; a window that begins inside a document begins with the context tokens. The
    last window is padded on the right, where nothing counts. Windows without a counted token
    are left out.

    Args:
        documents: At least one token in all.
        window_tokens: Length of a window, more than len(context_ids) + 1.
        context_ids: Ids that the model expects before a text.
        padding_id: Id that fills the last window; never counted, attended by no counted token.

    Returns:
        Windows of shape [windows, window_tokens], which may be none.
    """
    columns = _stream(documents)
    fresh = window_tokens - len(context_ids)
    total = len(columns[0])
    begins = range(0, max(total - 1, 1), fresh - 1)
    cut = [_window(columns, begin, fresh, context_ids, window_tokens) for begin in begins]
    token_ids, counted, text_bytes, position_ids = (torch.stack(c) for c in zip(*cut, strict=True))
    token_ids = token_ids.masked_fill(token_ids < 0, padding_id)
    windows = Windows(token_ids, position_ids, counted.bool(), text_bytes)
    return windows.rows(windows.counted.any(1).nonzero().flatten())


def _stream(documents: Sequence[TokenisedDocument]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    columns = (
        [i for document in documents for i in document.token_ids],
        [c for document in documents for c in document.counted],
        [b for document in documents for b in document.text_bytes],
        [n for document in documents for n in range(len(document.token_ids))],
    )
    ids, counted, text_bytes, positions = (torch.tensor(c, dtype=torch.long) for c in columns)
    return ids, counted, text_bytes, positions


def _window(
    columns: tuple[Tensor, Tensor, Tensor, Tensor],
    begin: int,
    fresh: int,
    context_ids: Sequence[int],
    window_tokens: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    ids, counted, text_bytes, positions = (column[begin : begin + fresh] for column in columns)
    lead = torch.tensor([] if positions[0] == 0 else list(context_ids), dtype=torch.long)
    zeros = torch.zeros_like(lead)
    gap = window_tokens - len(lead) - len(ids)
    # The first token was a target of the window before; a document's first has nothing before it.
    predicted = (torch.arange(len(ids)) > 0) & (positions > 0)
    blocks = (
        (lead, ids, torch.full((gap,), -1)),
        (zeros, counted * predicted, torch.zeros(gap, dtype=torch.long)),
        (zeros, text_bytes, torch.zeros(gap, dtype=torch.long)),
    )
    cat = [torch.cat(block) for block in blocks]
    starts = torch.cat([torch.zeros(len(lead), dtype=torch.bool), (positions == 0)])
    return cat[0], cat[1], cat[2], _restarting(starts, window_tokens)


def _restarting(starts: Tensor, length: int) -> Tensor:
    places = torch.arange(length)
    padded = torch.cat([starts, torch.zeros(length - len(starts), dtype=torch.bool)])
    return places - (places * padded).cummax(0).values
