"""Tensors written part by part: the bytes that safetensors writes of the whole ones."""

from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from trimtab.store.streamed import Streamed, rows_of, save_streamed

DTYPES = (
    torch.uint8,
    torch.int8,
    torch.bool,
    torch.float16,
    torch.bfloat16,
    torch.int32,
    torch.float32,
    torch.int64,
    torch.float64,
)


@st.composite
def tensors(draw: st.DrawFn) -> Tensor:
    shape = draw(st.lists(st.integers(min_value=0, max_value=5), min_size=1, max_size=3))
    seed = draw(st.integers(min_value=0, max_value=99))
    values = torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 50
    return values.to(draw(st.sampled_from(DTYPES)))


@settings(deadline=None)
@given(
    whole=st.dictionaries(st.text(min_size=1, max_size=12), tensors(), min_size=1, max_size=6),
    cut=st.integers(min_value=1, max_value=4),
)
def test_the_file_is_that_of_safetensors(whole: dict[str, Tensor], cut: int) -> None:
    parts = {name: rows_of(tensor.split(cut)) for name, tensor in whole.items()}
    with TemporaryDirectory() as folder:
        expected, found = Path(folder, "expected"), Path(folder, "found")
        save_file(whole, expected)
        save_streamed(found, parts)
        assert found.read_bytes() == expected.read_bytes()


def test_parts_are_asked_for_one_after_the_other_and_need_not_lie_in_a_row(tmp_path: Path) -> None:
    square = torch.arange(12, dtype=torch.float32).reshape(3, 4)
    asked = (part for part in (square.T[:1], square.T[1:]))
    save_streamed(tmp_path / "file", {"square": Streamed(torch.float32, (4, 3), asked)})
    assert torch.equal(load_file(tmp_path / "file")["square"], square.T)


@pytest.mark.parametrize("rows", [1, 3])
def test_parts_that_are_not_the_whole_are_refused(rows: int, tmp_path: Path) -> None:
    told = Streamed(torch.float32, (2, 4), [torch.zeros(rows, 4)])
    with pytest.raises(ValueError, match="parts of wrong"):
        save_streamed(tmp_path / "file", {"wrong": told})
