"""An adapter's tensors on disk: what is read is what was written."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from trimtab.anchors import Anchors
from trimtab.carriers.gate import GATE_FEATURES
from trimtab.carriers.head import Head
from trimtab.carriers.memory import Memory, lay_out
from trimtab.carriers.sources import Sources
from trimtab.errors import AdapterError
from trimtab.store.adapter import (
    HEAD_FILE,
    MEMORY_FILE,
    MOUNT_FILE,
    HeadFile,
    MemoryFile,
    Probe,
    pack_strings,
    read_head,
    read_memory,
    read_mount,
    unpack_strings,
    write_head,
    write_memory,
    write_mount,
)
from trimtab.store.adapter_schema import (
    AdapterManifest,
    BaseModelReference,
    Gate,
    MemoryCarrier,
)

BASE = BaseModelReference(
    ref="tiny:llama", vocabulary_sha256="a" * 64, unembedding_sha256="b" * 64, hidden=6
)
STRINGS = (b"the", b"\x00\xff", " é".encode(), b"a" * 300)
GATE = tuple(0.5 * n - 1 for n in range(len(GATE_FEATURES)))
OWN_GATE = tuple(0.1 * n for n in range(len(GATE_FEATURES)))
BYTES_GATE = tuple(0.25 * n for n in range(len(GATE_FEATURES)))


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@settings(deadline=None, derandomize=True)
@given(st.lists(st.binary(max_size=6), max_size=8))
def test_strings_come_back(strings: list[bytes]) -> None:
    assert unpack_strings(*pack_strings(strings)) == tuple(strings)


def mount_parts() -> tuple[Anchors, Probe]:
    rows = draw(4, 6, seed=1) * torch.tensor([1e-3, 1.0, 100.0, 0.0])[:, None]
    probe = Probe(
        (b"first document", b"", "é".encode()),
        torch.tensor([0, 0, 2], dtype=torch.int32),
        torch.tensor([5, 14, 2], dtype=torch.int32),
        draw(6, seed=2),
        draw(6, seed=3).abs(),
    )
    return Anchors(STRINGS, rows, torch.tensor([3.0, 2.0, 0.05, 0.05])), probe


def test_mount_comes_back(tmp_path: Path) -> None:
    anchors, probe = mount_parts()
    write_mount(tmp_path, anchors, probe)
    found, found_probe = read_mount(tmp_path)
    assert found.strings == anchors.strings
    assert torch.equal(found.weights, anchors.weights)
    # Eight bits a row: at most half a step of its largest value.
    step = anchors.rows.abs().amax(1, keepdim=True) / 127
    assert ((found.rows - anchors.rows).abs() <= 0.501 * step).all()
    assert found_probe.documents == probe.documents
    for name in ("document_index", "byte_ends", "mean", "std"):
        assert torch.equal(getattr(found_probe, name), getattr(probe, name))
    assert load_file(tmp_path / MOUNT_FILE)["anchor_rows"].dtype == torch.int8


def head_file() -> HeadFile:
    head = Head(draw(2, 6, seed=4), draw(6, 2, seed=5), draw(6, seed=6), draw(6, seed=7))
    return HeadFile(head, STRINGS, draw(4, 3, seed=8), draw(9, 2, seed=9))


def test_a_head_comes_back(tmp_path: Path) -> None:
    written = head_file()
    write_head(tmp_path, written)
    found = read_head(tmp_path)
    assert found.strings == written.strings
    for name, tensor in written.head.tensors().items():
        assert torch.equal(found.head.tensors()[name], tensor)
    states = draw(5, 6, seed=10)
    assert torch.equal(found.head.shift(states), written.head.shift(states))
    assert torch.equal(found.string_rows, written.string_rows.half().float())
    assert torch.equal(found.probe_features, written.probe_features.half().float())


def memory_file(*, soft: bool) -> MemoryFile:
    text, starts = lay_out([b"the rudder", b"\xff\x00 turns"])
    memory = Memory(
        draw(3, 4, seed=11).half(),
        draw(4, 6, seed=12),
        draw(6, seed=13),
        text,
        torch.tensor([starts[0], starts[0] + 3, starts[1]]),
        GATE,
        OWN_GATE,
        BYTES_GATE,
        torch.tensor([[0, 1], [3, 2], [1, 1]], dtype=torch.int32) if soft else None,
        torch.tensor([[0.5, 0.25], [0.75, 0.125], [1.0, 0.0]]).half() if soft else None,
        *((STRINGS,) if soft else ()),
        sources=Sources(("boats/rudder.txt", "äöü.txt"), tuple(starts)) if soft else None,
    )
    return MemoryFile(memory, draw(7, 4, seed=14))


def manifest(*, soft: bool) -> AdapterManifest:
    carrier = MemoryCarrier(
        entries=3,
        key_size=4,
        values="soft" if soft else "hard",
        gate=Gate(features=GATE_FEATURES, weights=GATE),
        own_gate=Gate(features=GATE_FEATURES, weights=OWN_GATE),
        bytes_gate=Gate(features=GATE_FEATURES, weights=BYTES_GATE),
    )
    return AdapterManifest(name="ships", base_model=BASE, carriers={"memory": carrier})


@pytest.mark.parametrize("soft", [False, True])
def test_a_memory_comes_back(tmp_path: Path, soft: bool) -> None:
    written = memory_file(soft=soft)
    write_memory(tmp_path, written)
    found = read_memory(tmp_path, manifest(soft=soft))
    assert torch.equal(found.probe_features, written.probe_features.half().float())
    for name, value in vars(written.memory).items():
        kept = getattr(found.memory, name)
        if isinstance(value, Tensor):
            assert torch.equal(kept, value) and kept.dtype == value.dtype, name
        else:
            assert kept == value, name


def test_sources_that_do_not_fit_together_are_refused(tmp_path: Path) -> None:
    whole = memory_file(soft=True)
    torn = replace(whole.memory, sources=Sources(("one", "two"), (16,)))
    write_memory(tmp_path, MemoryFile(torn, whole.probe_features))
    with pytest.raises(AdapterError, match="names 2 documents and says of 1"):
        read_memory(tmp_path, manifest(soft=True))


def test_equal_parts_are_equal_bytes(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        write_mount(tmp_path / folder, *mount_parts())
        write_head(tmp_path / folder, head_file())
        write_memory(tmp_path / folder, memory_file(soft=True))
    for name in (MOUNT_FILE, HEAD_FILE, MEMORY_FILE):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_a_missing_file_a_missing_tensor_and_a_broken_file_are_named(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match=f"{HEAD_FILE} is missing"):
        read_head(tmp_path)
    write_head(tmp_path, head_file())
    tensors = load_file(tmp_path / HEAD_FILE)
    save_file({n: t for n, t in tensors.items() if n != "up"}, tmp_path / HEAD_FILE)
    with pytest.raises(AdapterError, match="lacks the tensor 'up'"):
        read_head(tmp_path)
    write_mount(tmp_path, *mount_parts())
    whole = (tmp_path / MOUNT_FILE).read_bytes()
    (tmp_path / MOUNT_FILE).write_bytes(whole[:-4])
    with pytest.raises(AdapterError, match=f"{MOUNT_FILE} is broken"):
        read_mount(tmp_path)
