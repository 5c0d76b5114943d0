"""Kinds of tokens, and what rows pay for each, against sums by hand."""

import json
import math
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bench import slices
from trimtab.backends.open import open_model
from trimtab.errors import InputError
from trimtab.steering.kept import Kept, write_scores
from trimtab.steering.scoring import RowScore, ScoredDocument


@pytest.mark.parametrize(
    ("pieces", "kinds"),
    [
        (["const", " x", "12", "\n    ", " "], ["rest", "rest", "digits", "white space", "rest"]),
        (["für", " 2ter", "\n", "  ", "\t"], ["accents", "digits", *["white space"] * 3]),
        (["Пакет", " apt", " и2", "界"], ["other script", "rest", "other script", "other script"]),
        (["١", "€"], ["digits", "accents"]),
    ],
)
def test_kinds(pieces: list[str], kinds: list[str]) -> None:
    assert slices.kinds_of([piece.encode() for piece in pieces]) == kinds


@given(st.text(max_size=40), st.lists(st.integers(1, 3), max_size=60))
def test_parts_of_a_character_are_of_its_kind(text: str, sizes: list[int]) -> None:
    raw, pieces = text.encode(errors="ignore"), []
    for size in [*sizes, len(text) * 4]:
        pieces.append(raw[:size])
        raw = raw[size:]
    kinds = slices.kinds_of(pieces)
    assert len(kinds) == len(pieces)
    for piece, kind in zip(pieces, kinds, strict=True):
        assert (kind in ("other script", "accents")) <= (max(piece, default=0) >= 0x80)
        assert (kind == "white space") <= (piece.strip() == b"")


def scored(text: str, host_nats: float, live_nats: float) -> Kept:
    """A document of which each token of one byte costs a row the same."""
    ids = open_model("tiny:llama").encode(text)
    each = {"host": host_nats, "live": live_nats}
    rows = {
        row: RowScore(torch.full((len(ids),), -nats), torch.zeros(len(ids)), torch.zeros(len(ids)))
        for row, nats in each.items()
    }
    return Kept(ScoredDocument(tuple(ids), (1,) * len(ids), rows), {})


def test_figures_are_of_each_kind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for number, (text, live) in enumerate((("a1\n\nb22", 0.5), ("c3", 1.0), ("other", 9.0))):
        write_scores(tmp_path / "scores" / f"{number}.safetensors", scored(text, 1.0, live))
        if number < 2:
            (tmp_path / f"{number}.txt").write_text(f"before {text} after")
    out, host = tmp_path / "found.json", "tiny:llama"
    words = ["--scores", str(tmp_path / "scores"), "--host", host, "--out", str(out)]
    monkeypatch.setattr(sys, "argv", ["slices", *words, "--texts", f"{tmp_path}/*.txt"])
    slices.main()
    found = json.loads(out.read_text())
    digits = found["kinds"]["digits"]
    assert found["documents"] == 2
    assert digits["tokens"] == digits["bytes"] == 4
    rows = digits["rows"]
    assert rows["host"]["bits_per_byte"]["mean"] == pytest.approx(1 / math.log(2))
    assert rows["live"]["bits_per_byte"]["mean"] == pytest.approx(2.5 / 4 / math.log(2))
    assert rows["live"]["change_percent"]["mean"] == pytest.approx(-37.5)
    assert "digits: 4 tokens, host 1.443; live -37.5" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["slices", *words, "--texts", f"{tmp_path}/none"])
    with pytest.raises(InputError, match="keeps no scores of"):
        slices.main()
