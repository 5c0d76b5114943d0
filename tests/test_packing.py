"""Packed windows predict every token once, count what spans say, and keep documents apart."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trimtab.backends.open import open_model
from trimtab.text.packing import TokenisedDocument, counted_by_spans, pack

BOS = 900


def document(ids: list[int], context: list[int]) -> TokenisedDocument:
    size = len(ids)
    return TokenisedDocument(
        token_ids=[*context, *ids],
        counted=[False] * len(context) + [True] * size,
        text_bytes=[0] * len(context) + [1] * size,
    )


def numbered(lengths: list[int], context: list[int]) -> list[TokenisedDocument]:
    """Documents whose ids are all different, so that each can be found again."""
    starts = [sum(lengths[:n]) for n in range(len(lengths))]
    return [
        document(list(range(start, start + length)), context)
        for start, length in zip(starts, lengths, strict=True)
    ]


@given(st.lists(st.integers(1, 30), min_size=1, max_size=6), st.integers(4, 12), st.booleans())
@settings(max_examples=60, deadline=None)
def test_every_token_is_predicted_once_from_its_own_document(
    lengths: list[int], window: int, wants_bos: bool
) -> None:
    context = [BOS] if wants_bos else []
    documents = numbered(lengths, context)
    windows = pack(documents, window_tokens=window, context_ids=context, padding_id=901)

    predicted: list[int] = []
    for ids, positions, counted in zip(
        windows.token_ids, windows.position_ids, windows.counted, strict=True
    ):
        assert not counted[0]
        for column in counted.nonzero().flatten().tolist():
            token, before = int(ids[column]), int(ids[column - 1])
            predicted.append(token)
            assert before in (token - 1, BOS)
            assert positions[column] == positions[column - 1] + 1
    ids = [d.token_ids[len(context) :] for d in documents]
    expected = [token for one in ids for token in one[0 if wants_bos else 1 :]]
    assert sorted(predicted) == sorted(expected)


@given(
    st.text(alphabet="aé漢 😀", min_size=1, max_size=20),
    st.lists(st.integers(0, 20), max_size=6),
    st.lists(st.integers(1, 5), min_size=60, max_size=60),
    st.integers(0, 1),
)
@settings(max_examples=100, deadline=None)
def test_counted_tokens_against_a_search_byte_by_byte(
    text: str, edges: list[int], cuts: list[int], offset: int
) -> None:
    edges = sorted({min(edge, len(text)) for edge in edges})
    spans = list(zip(edges[0::2], edges[1::2], strict=False))
    data, pieces = b" " * offset + text.encode(), []
    while data:
        size = cuts[len(pieces)]
        pieces.append(data[:size])
        data = data[size:]

    owner = [index for index, letter in enumerate(text) for _ in letter.encode()]
    wanted, place = [], -offset
    for piece in pieces:
        owners = [owner[at] for at in range(place, place + len(piece)) if at >= 0]
        inside = any(start <= letter < end for letter in owners for start, end in spans)
        wanted.append(inside or not spans)
        place += len(piece)
    assert counted_by_spans(pieces, spans, text, offset_bytes=offset) == wanted


def test_tokens_that_are_not_the_text_are_refused() -> None:
    with pytest.raises(ValueError, match="not the text"):
        counted_by_spans([b"ab"], [(0, 1)], "ac")


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "gemma3", "gpt2"])
def test_packed_documents_do_not_see_each_other(family: str) -> None:
    model = open_model(f"tiny:{family}?hidden=32", dtype="float32")
    context = model.context_ids()
    texts = ["const std = 1;", "fn main() void {}", "return 7;"]
    encoded = [[*context, *model.encode(text)] for text in texts]
    windows = pack(
        [TokenisedDocument(ids, [True] * len(ids), [1] * len(ids)) for ids in encoded],
        window_tokens=sum(map(len, encoded)) + 3,
        context_ids=context,
    )
    assert len(windows) == 1
    with torch.no_grad():
        packed = model.model(
            input_ids=windows.token_ids, position_ids=windows.position_ids, use_cache=False
        ).logits[0]
    start = 0
    for ids in encoded:
        alone = model.logits(torch.tensor([ids]))[0]
        torch.testing.assert_close(packed[start : start + len(ids)], alone, rtol=1e-5, atol=1e-5)
        start += len(ids)
