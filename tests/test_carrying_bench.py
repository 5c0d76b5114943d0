"""What an expert loses on its way to a host's tokens: by hand, and beside a host without loss."""

import math

import pytest
import torch

from bench.carrying import Piece, Span, beginning, carried_pieces, own_pieces, spans, summary
from trimtab.backends.live import Live
from trimtab.backends.open import open_model
from trimtab.backends.pair import Pair


def test_costs_are_summed_between_common_boundaries() -> None:
    host = [Piece(0, b"Mor", 1.0, 0.1), Piece(3, b"bus", 4.0, 0.2), Piece(6, b" C", 0.5, 0.3)]
    small = [
        *(Piece(0, b"M", 0.5), Piece(1, b"orb", 0.25), Piece(4, b"us", 0.25)),
        *(Piece(6, b" ", 0.5), Piece(7, b"C", 0.5), Piece(8, b"r", 0.5)),
    ]
    found = list(spans([*host, Piece(8, b"rohn", 1.0, 1.0)], small))
    assert found == [
        Span("Mor|bus", 6, 5.0, 1.0, pytest.approx(0.3)),
        Span(" C", 2, 0.5, 1.0, 0.3),
    ]
    figures = summary([*found, found[1]])
    assert figures["bytes"] == 10 and figures["times"] == {"Mor|bus": 1, " C": 2}
    assert figures["lost_nats"] == {"Mor|bus": 4.0, " C": -1.0}
    assert figures["carried_bits_per_byte"] == pytest.approx(6.0 / 10 / math.log(2))
    assert figures["own_bits_per_byte"] == pytest.approx(3.0 / 10 / math.log(2))


def test_a_host_of_the_same_bytes_loses_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trimtab.backends.live.DOUBT", 0.0)
    models = [open_model(f"tiny:llama?seed={seed}", dtype="float32") for seed in (1, 2)]
    live = Live(Pair(*models), host := open_model("tiny:gpt2?vocab=bytes", dtype="float32"))
    ids, text = beginning(host, "Die Wunde heilt. Größe\n\nÄ", 26)
    assert text.decode().startswith("Die Wunde heilt. Grö")
    with torch.inference_mode():
        carried, own = list(carried_pieces(host, live, ids)), list(own_pieces(live, text))
    assert [piece.text for piece in carried] == [piece.text for piece in own][-len(carried) :]
    found = list(spans(carried, own))
    assert len(found) > 20
    for span in found:
        # The end of a text is the host's to say: one token of some 260.
        assert span.carried_nats == pytest.approx(span.own_nats, abs=1e-2)
        assert span.host_nats > 0
