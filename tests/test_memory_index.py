"""The search over a large memory as it is kept on disk: the same as made anew, exact, or remade."""

import gc
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import faiss
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from joining import joined
from safetensors.torch import load_file, save_file
from torch import Tensor

from trimtab.carriers.memory import Memory, contexts_before, lay_out
from trimtab.carriers.search import (
    LISTED_ENTRIES,
    MAPPED_MATCH_WEIGHT,
    NEIGHBOURS,
    Found,
    Index,
    build_index,
    byte_order,
    look_up,
    merged_byte_order,
)
from trimtab.processes import Piece, do_pieces
from trimtab.store.index import (
    index_path,
    kept_index,
    lists_before,
    no_entries,
    read_index,
    write_index,
)
from trimtab.types import Advance, silent

KEY = 16


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def large(seed: int = 0, entries: int = LISTED_ENTRIES) -> Memory:
    generator = torch.Generator().manual_seed(seed)
    document = torch.randint(97, 102, (entries,), generator=generator, dtype=torch.uint8)
    text, starts = lay_out([document.numpy().tobytes()])
    keys = torch.nn.functional.normalize(draw(entries, KEY, seed=seed + 1), dim=-1).half()
    positions = starts[0] + torch.randperm(entries, generator=generator)
    return Memory(keys, torch.eye(KEY), torch.zeros(KEY), text, positions)


@pytest.fixture(scope="module")
def memory() -> Memory:
    return large()


@pytest.fixture(scope="module")
def built(memory: Memory) -> Index:
    return build_index(memory)


@pytest.fixture(scope="module")
def written(memory: Memory, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("indexes") / "kept.safetensors"
    write_index(path, memory, silent)
    return path


def ask(memory: Memory, index: Index, count: int = 40) -> Found:
    before = contexts_before(memory.text, memory.positions[:count] - 1)
    weight = torch.full((count,), MAPPED_MATCH_WEIGHT)
    return look_up(memory, index, draw(count, KEY, seed=9), before, weight)


def test_kept_lists_find_what_lists_made_anew_find(
    memory: Memory, built: Index, written: Path
) -> None:
    index = read_index(written, memory)
    assert index is not None
    # The mapping lives as long as the index alone.
    gc.collect()
    one, two = ask(memory, built), ask(memory, index)
    assert torch.equal(one.entries, two.entries)
    assert torch.equal(one.weights, two.weights)
    assert torch.equal(one.matched_bytes, two.matched_bytes)
    assert (built.contexts == index.contexts).all()
    assert torch.equal(built.entries, index.entries)


def test_all_lists_together_are_the_exact_search(memory: Memory, written: Path) -> None:
    index = read_index(written, memory)
    assert index is not None and isinstance(index.keys, faiss.IndexIVF)
    index.keys.nprobe = index.keys.nlist
    asked = torch.nn.functional.normalize(draw(20, KEY, seed=3), dim=-1)
    cosines, entries = index.keys.search(asked.numpy(), NEIGHBOURS)  # pyright: ignore
    exact = (asked @ memory.keys.float().T).topk(NEIGHBOURS)
    torch.testing.assert_close(torch.from_numpy(cosines), exact.values)
    # Neighbours of one cosine may change places.
    gathered = (asked[:, None] * memory.keys[torch.from_numpy(entries)].float()).sum(-1)
    torch.testing.assert_close(gathered, exact.values)
    assert all(len(set(row)) == NEIGHBOURS for row in entries.tolist())


def test_a_memory_that_has_grown_keeps_its_lists(
    memory: Memory, written: Path, tmp_path: Path
) -> None:
    more = large(seed=5, entries=3_000)
    grown = joined(memory, [more])
    index = kept_index(grown, tmp_path / "grown.safetensors", silent, [(written, len(memory))])
    anew = kept_index(grown, tmp_path / "anew.safetensors", silent)
    before, after = load_file(written), load_file(tmp_path / "grown.safetensors")
    assert torch.equal(before["centres"], after["centres"])
    assert not torch.equal(load_file(tmp_path / "anew.safetensors")["centres"], before["centres"])
    for each in (index, anew):
        assert isinstance(each.keys, faiss.IndexIVF)
        each.keys.nprobe = each.keys.nlist
    found, exact = ask(grown, index), ask(grown, anew)
    assert torch.equal(found.entries.sort().values, exact.entries.sort().values)
    assert (index.contexts == anew.contexts).all() and torch.equal(index.entries, anew.entries)
    # Keys lie in the list of the nearest centre, those that were appended as well as the others.
    nearest = (grown.keys.float() @ before["centres"].T).argmax(1)
    places = listed_before(grown, [(tmp_path / "grown.safetensors", len(grown))])
    assert places is not None and torch.equal(places, nearest)


def test_lists_that_are_too_few_or_broken_are_made_anew(
    memory: Memory, written: Path, tmp_path: Path
) -> None:
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(written.read_bytes()[:-9])
    grown = joined(memory, [large(seed=5, entries=3_000)])
    assert listed_before(grown, [(broken, len(memory)), (tmp_path / "no", 5)]) is None
    assert listed_before(grown, [(written, len(memory) - 1)]) is None
    assert listed_before(grown, [(broken, len(memory)), (written, len(memory))]) is not None
    four_times = joined(memory, [large(seed=number) for number in range(3)])
    assert listed_before(four_times, [(written, len(memory))]) is None


def listed_before(memory: Memory, earlier: list[tuple[Path, int]]) -> Tensor | None:
    """The list of each entry, as the file of a smaller memory has it."""
    listed = lists_before(memory, earlier)
    if listed is None:
        return None
    places = torch.zeros(len(listed), dtype=torch.long)
    first = 0
    for place, end in enumerate(listed.list_ends.tolist()):
        block = listed.lists[first * (2 * KEY + 8) : end * (2 * KEY + 8)]
        places[block[(end - first) * 2 * KEY :].clone().view(torch.int64)] = place
        first = end
    return places


@pytest.mark.parametrize("sizes", [(1,), (3_000,), (700, 0, 2_000)])
def test_an_index_that_has_grown_is_the_file_made_anew_with_the_same_centres(
    sizes: tuple[int, ...], memory: Memory, written: Path, tmp_path: Path
) -> None:
    grown, latest = memory, written
    for number, size in enumerate(sizes):
        smaller = len(grown)
        if size:
            grown = joined(grown, [large(seed=20 + number, entries=size)])
        path = tmp_path / f"{number}.safetensors"
        write_index(path, grown, silent, lists_before(grown, [(latest, smaller)]))
        latest = path
    anew = tmp_path / "anew.safetensors"
    write_index(anew, grown, silent, no_entries(load_file(written)["centres"]))
    assert latest.read_bytes() == anew.read_bytes()
    assert [each.name for each in tmp_path.glob(".*")] == []


@settings(deadline=None)
@given(
    documents=st.lists(st.lists(st.sampled_from(b"\0ab"), max_size=40), min_size=1, max_size=6),
    first=st.integers(min_value=0, max_value=200),
    seed=st.integers(min_value=0, max_value=99),
)
def test_byte_order_of_a_memory_that_has_grown_is_that_of_one_sorted_anew(
    documents: list[list[int]], first: int, seed: int
) -> None:
    text, starts = lay_out([bytes(document) for document in documents])
    places = [
        start + place
        for start, document in zip(starts, documents, strict=True)
        for place in range(len(document) + 1)
    ]
    order = torch.randperm(len(places), generator=torch.Generator().manual_seed(seed))
    nothing = torch.zeros(0)
    whole = Memory(nothing, nothing, nothing, text, torch.tensor(places)[order])
    smaller = replace(whole, positions=whole.positions[:first])
    contexts, entries = merged_byte_order(whole, *byte_order(smaller))
    expected_contexts, expected_entries = byte_order(whole)
    assert contexts.tobytes() == expected_contexts.tobytes()
    assert torch.equal(entries, expected_entries)


def test_an_index_is_made_once(memory: Memory, tmp_path: Path) -> None:
    path = tmp_path / "home" / "kept.safetensors"
    first = kept_index(memory, path, silent)
    stamp = path.stat().st_mtime_ns
    again = kept_index(memory, path, silent)
    assert path.stat().st_mtime_ns == stamp
    assert [each.name for each in path.parent.iterdir()] == [path.name]
    assert torch.equal(ask(memory, first).entries, ask(memory, again).entries)


def test_two_processes_make_one_index_at_once(memory: Memory, tmp_path: Path) -> None:
    path, begun = tmp_path / "home" / "kept.safetensors", [tmp_path / "0", tmp_path / "1"]

    def make(number: int) -> Piece:
        @contextmanager
        def together(label: str, total: int) -> Iterator[Advance]:
            # Both have looked for an index, and neither has written one.
            begun[number].touch()
            deadline = time.monotonic() + 60
            while not all(each.exists() for each in begun):
                assert time.monotonic() < deadline
                time.sleep(0.001)
            yield lambda _: None

        def do(advance: Advance) -> None:
            index = kept_index(memory, path, together)
            begun[number].with_suffix(f".{os.getpid()}").write_bytes(index.contexts.tobytes())

        return Piece(do, 1)

    do_pieces([make(0), make(1)], lambda _: None, 2)
    made = list(tmp_path.glob("*.*"))
    assert len({each.suffix for each in made}) == len(made) == 2
    contexts = byte_order(memory)[0].tobytes()
    assert {each.read_bytes() for each in made} == {contexts}
    assert [each.name for each in path.parent.iterdir()] == [path.name]
    assert read_index(path, memory) is not None


def test_small_memories_are_searched_exactly_and_not_kept(tmp_path: Path) -> None:
    small = large(entries=1000)
    index = kept_index(small, tmp_path / "kept.safetensors", silent)
    assert (
        isinstance(index.keys, Tensor) and len(index.keys) == 1000 and not list(tmp_path.iterdir())
    )


@pytest.mark.parametrize("damage", ["empty", "foreign", "cut", "lacking", "ends", "shape", "type"])
def test_a_damaged_index_is_no_index(
    damage: str, memory: Memory, written: Path, tmp_path: Path
) -> None:
    path = tmp_path / "kept.safetensors"
    good = written.read_bytes()
    found = load_file(written)
    if damage == "lacking":
        del found["list_ends"]
    elif damage == "ends":
        found["list_ends"] = found["list_ends"].flip(0)
    elif damage == "shape":
        found["entries"] = found["entries"][1:]
    elif damage == "type":
        found["centres"] = found["centres"].half()
    save_file(found, path)
    content = {"empty": b"", "foreign": b"not a tensor file", "cut": good[:-10]}
    if damage in content:
        path.write_bytes(content[damage])
    assert read_index(path, memory) is None


def test_an_index_of_another_memory_is_no_index(written: Path) -> None:
    assert read_index(written, large(entries=LISTED_ENTRIES + 1)) is None


def test_other_keys_have_another_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TRIMTAB_HOME", str(tmp_path))
    one, two = index_path("a" * 64), index_path("b" * 64)
    assert one != two and one == index_path("a" * 64) and one.is_relative_to(tmp_path)
