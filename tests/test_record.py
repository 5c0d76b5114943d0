"""Recording a real tiny pair: completeness, fidelity, resuming, and reading with checks."""

import json
import resource
import shutil
import sys
import time
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from threading import current_thread, main_thread

import numpy as np
import pytest
import torch
from children import record_slowly, started
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from trimtab.backends.pair import open_pair
from trimtab.config import FitConfig, RecordConfig, TuneConfig
from trimtab.encoding import Samples, TopK, decode_samples, decode_topk
from trimtab.errors import InputError, NumericalError, RecordingError, StorageError
from trimtab.fit import fit
from trimtab.record import record
from trimtab.soft_targets import Heads, run_passages, state_columns
from trimtab.store.files import write_json
from trimtab.store.recording import COMMON_COLUMNS, Recording, column_names, write_shard
from trimtab.store.recording_schema import SPLITS
from trimtab.text.corpus import load_documents
from trimtab.text.passages import (
    DocumentTokens,
    Passage,
    cut_shards,
    passages,
    rows_of,
    tokenised,
)
from trimtab.text.probe import probe_documents
from trimtab.tune import tune
from trimtab.types import Document

SENTENCES = "The trim tab turns the rudder, and the rudder turns the ship. "


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("texts")
    for number in range(4):
        (folder / f"{number}.txt").write_text(f"{number}: {SENTENCES * (1 + 2 * number)}")
    (folder / "general").mkdir()
    (folder / "general" / "prose.md").write_text("Plain prose about nothing in particular. " * 4)
    return folder


def tuned(texts: Path, out: Path, **options: object) -> Path:
    config = {
        "model": "tiny:llama",
        "data": (str(texts / "*.txt"),),
        "out": out,
        "learning_rate": 1e-2,
        "window_tokens": 64,
        "held_out": 0.25,
        "validations": 1,
        "epochs": 3,
        "dtype": "float32",
    }
    return tune(TuneConfig.model_validate(config | options)).folder


@pytest.fixture(scope="module")
def expert(texts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tuned(texts, tmp_path_factory.mktemp("lora") / "expert")


@pytest.fixture(scope="module")
def full_expert(texts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tuned(texts, tmp_path_factory.mktemp("full") / "expert", method="full")


@pytest.fixture(scope="module")
def lone_expert(texts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tuned(texts, tmp_path_factory.mktemp("lone") / "expert", held_out=0.0)


@pytest.fixture(scope="module")
def bos_expert(texts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tuned(texts, tmp_path_factory.mktemp("bos") / "expert", model="tiny:gemma3")


def recorded(expert: Path, texts: Path, out: Path, **options: object) -> RecordConfig:
    config = {
        "expert": expert,
        "out": out,
        "general": (str(texts / "general"),),
        "window_tokens": 64,
        "stride_tokens": 40,
        "shard_tokens": 256,
        "dtype": "float32",
    }
    return RecordConfig.model_validate(config | options)


def opened(expert: Path, texts: Path, out: Path, **options: object) -> Recording:
    return Recording.open(record(recorded(expert, texts, out, **options)).folder)


@pytest.fixture(scope="module")
def exact(expert: Path, texts: Path, tmp_path_factory: pytest.TempPathFactory) -> Recording:
    return opened(expert, texts, tmp_path_factory.mktemp("exact") / "recording")


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@given(st.integers(1, 300), st.integers(2, 40), st.data())
def test_each_position_is_recorded_once_with_context(
    n_tokens: int, window: int, data: st.DataObject
) -> None:
    stride = data.draw(st.integers(1, window))
    parts = list(passages(n_tokens, window, stride))
    places = [place for _, record_from, end in parts for place in range(record_from, end)]
    assert places == list(range(n_tokens))
    for start, record_from, end in parts:
        assert end - start <= window
        assert start == 0 or record_from - start >= window - stride


@given(
    st.lists(st.integers(0, 50), min_size=1, max_size=30),
    st.integers(1, 400),
    st.integers(0, 3),
)
def test_a_token_limit_is_met_by_beginnings(lengths: list[int], limit: int, seed: int) -> None:
    documents = [Document(str(place), "x" * length) for place, length in enumerate(lengths)]
    taken = tokenised(
        documents, lambda document: [7] * len(document.text), max_tokens=limit, seed=seed
    )
    assert sum(len(document.token_ids) for document in taken) == min(limit, sum(lengths))
    assert [int(document.name) for document in taken] == sorted(int(d.name) for d in taken)
    assert all(0 < len(document.token_ids) <= lengths[int(document.name)] for document in taken)


def test_a_token_limit_is_spread_over_documents() -> None:
    documents = [Document(str(place), "x" * 1000) for place in range(40)]
    taken = tokenised(documents, lambda d: [7] * len(d.text), max_tokens=160, seed=1)
    assert [len(document.token_ids) for document in taken] == [10] * 16


@pytest.mark.parametrize("kind", ["expert", "bos_expert"])
def test_rows_are_the_text(
    kind: str, texts: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    expert = request.getfixturevalue(kind)
    recording = opened(expert, texts, tmp_path / "recording")
    encode = open_pair(expert, dtype="float32").reference.encode
    for split, name in (("train", "train.jsonl"), ("held_out", "held_out.jsonl")):
        documents = load_documents(expert / name)
        rows = recording.read(split)
        assert [d.name for d in recording.documents(split)] == [d.name for d in documents]
        assert len(rows["token_ids"]) == recording.manifest.splits[split].tokens
        for index, document in enumerate(documents):
            ids = list(encode(document.text))
            own = rows["document_index"] == index
            assert rows["token_ids"][own].tolist() == ids
            assert rows["next_ids"][own].tolist() == [*ids[1:], -1]
            assert recording.documents(split)[index].tokens == len(ids)


@pytest.mark.parametrize("kind", ["expert", "full_expert", "bos_expert"])
def test_exact_states_give_the_models_own_logits(
    kind: str, texts: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """Windows longer than every document, so that one plain forward pass is the oracle."""
    expert = request.getfixturevalue(kind)
    recording = opened(expert, texts, tmp_path / "recording", window_tokens=900, stride_tokens=900)
    pair = open_pair(expert, dtype="float32")
    rows = recording.read("train")
    head = recording.expert_unembedding() or pair.reference_unembedding
    assert (recording.expert_unembedding() is not None) == (kind == "full_expert")
    context = pair.reference.context_ids()
    assert bool(context) == (kind == "bos_expert")
    for index in range(len(recording.documents("train"))):
        own = rows["document_index"] == index
        ids = torch.tensor([[*context, *rows["token_ids"][own].tolist()]])
        oracle = pair.expert_logits(ids)[0, len(context) :]
        torch.testing.assert_close(
            head.logits(rows["expert_hidden"][own].float()), oracle, atol=4e-3, rtol=2e-3
        )
        oracle = pair.reference_logits(ids)[0, len(context) :]
        found = pair.reference_unembedding.logits(rows["reference_hidden"][own].float())
        torch.testing.assert_close(found, oracle, atol=4e-3, rtol=2e-3)
    assert not torch.equal(rows["expert_hidden"], rows["reference_hidden"])


def test_windows_see_their_context(exact: Recording, expert: Path) -> None:
    pair = open_pair(expert, dtype="float32")
    rows = exact.read("train", ["token_ids", "document_index", "expert_hidden"])
    index = max(rows["document_index"].tolist(), key=rows["document_index"].tolist().count)
    own = rows["document_index"] == index
    ids, states = rows["token_ids"][own].long(), rows["expert_hidden"][own].float()
    for start, record_from, end in passages(len(ids), 64, 40):
        oracle = pair.hidden(ids[None, start:end]).expert[0, record_from - start :]
        torch.testing.assert_close(states[record_from:end], oracle, atol=4e-3, rtol=2e-3)


def test_reading_shard_by_shard_equals_reading_all(exact: Recording) -> None:
    rows = exact.read("train")
    shards = list(exact.iter_shards("train"))
    assert len(shards) > 2
    assert all(len(shard["token_ids"]) <= 256 for shard in shards)
    for name, column in rows.items():
        assert torch.equal(column, torch.cat([shard[name] for shard in shards]))
    assert list(exact.read("train", ["next_ids"])) == ["next_ids"]


def target_logprobs(exact: Recording, expert: Path) -> torch.Tensor:
    head = open_pair(expert, dtype="float32").expert_unembedding
    states = exact.read("train", ["expert_hidden"])["expert_hidden"].float()
    return head.logits(states).log_softmax(-1).detach()


def test_error_against_bytes_per_token(
    exact: Recording, expert: Path, texts: Path, tmp_path: Path
) -> None:
    """Sparse: KL(expert, decoded) falls in k; sampled: squared error of the estimate does."""
    target = target_logprobs(exact, expert)
    vocab = exact.manifest.vocab
    for encoding, sizes in (("sparse", (1, 4, 16, 64)), ("sampled", (1, 4, 16, 64))):
        found = []
        for top_k in sizes:
            out = tmp_path / f"{encoding}-{top_k}"
            recording = opened(expert, texts, out, encoding=encoding, top_k=top_k)
            rows = recording.read("train")
            if encoding == "sparse":
                decoded = decode_topk(_topk(rows, "expert"), vocab)
                error = (target.exp() * (target - decoded)).sum(-1).mean().item()
            else:
                samples = Samples(rows["expert_sample_ids"], rows["expert_sample_counts"])
                assert (samples.counts.sum(-1) == top_k).all()
                estimate = decode_samples(samples, vocab)
                error = (estimate - target.exp()).square().sum(-1).mean().item()
            found.append((recording.manifest.bytes_per_token, error))
        assert found == sorted(found)
        errors = [error for _, error in found]
        assert errors == sorted(errors, reverse=True)


def _topk(rows: dict[str, torch.Tensor], who: str) -> TopK:
    names = ("top_ids", "top_logprobs", "log_tail", "log_normaliser")
    return TopK(*(rows[f"{who}_{name}"] for name in names))


def test_sparse_columns_are_the_models_own(
    exact: Recording, expert: Path, texts: Path, tmp_path: Path
) -> None:
    rows = opened(expert, texts, tmp_path / "r", encoding="sparse", top_k=8).read("train")
    head = open_pair(expert, dtype="float32").expert_unembedding
    for who in ("expert", "reference"):
        logits = head.logits(exact.read("train")[f"{who}_hidden"].float()).detach()
        topk = _topk(rows, who)
        own = logits.gather(-1, topk.token_ids.long())
        found = topk.logprobs + topk.log_normaliser[:, None]
        torch.testing.assert_close(found, own, atol=1e-2, rtol=2e-3)
        tail = 1 - topk.logprobs.exp().sum(-1)
        torch.testing.assert_close(topk.log_tail.exp(), tail, atol=1e-5, rtol=0)
    assert torch.equal(rows["reference_hidden"], exact.read("train")["reference_hidden"])


@pytest.mark.parametrize("encoding", ["exact", "compact", "sparse", "sampled"])
def test_the_expert_reads_the_training_text_alone(
    encoding: str, expert: Path, texts: Path, tmp_path: Path
) -> None:
    recording = opened(expert, texts, tmp_path / "r", encoding=encoding, top_k=8)
    model = open_pair(expert, dtype="float32").reference
    assert set(recording.read("train")) == set(column_names(encoding)) > set(COMMON_COLUMNS)
    for split in ("held_out", "general"):
        rows = recording.read(split)
        assert set(rows) == set(COMMON_COLUMNS)
        own = rows["document_index"] == 0
        ids, found = rows["token_ids"][own].long(), rows["reference_hidden"][own].float()
        for start, record_from, end in passages(len(ids), 64, 40):
            context = model.context_ids()
            states = model.hidden(torch.tensor([[*context, *ids[start:end].tolist()]]))[0]
            oracle = states[len(context) + record_from - start :]
            torch.testing.assert_close(found[record_from:end], oracle, atol=4e-3, rtol=2e-3)
    manifest = recording.manifest
    assert manifest.read_tokens == manifest.tokens + manifest.splits["train"].tokens


@pytest.mark.parametrize("encoding", ["exact", "compact", "sparse", "sampled"])
def test_a_recording_of_the_expert_everywhere_is_read_and_fitted_alike(
    encoding: str, expert: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"encoding": encoding, "top_k": 8}
    ours = opened(expert, texts, tmp_path / "ours", **options)
    monkeypatch.setattr(sys.modules["trimtab.record"], "EXPERT_SPLITS", SPLITS)
    everywhere = opened(expert, texts, tmp_path / "everywhere", **options)
    path = everywhere.folder / "recording.json"
    raw = json.loads(path.read_text())
    # A recording that does not say holds it everywhere.
    assert raw.pop("expert_splits") == list(SPLITS)
    path.write_text(json.dumps(raw))
    everywhere = Recording.open(everywhere.folder)
    assert everywhere.manifest.read_tokens == 2 * everywhere.manifest.tokens
    for split in SPLITS:
        rows = everywhere.read(split)
        assert set(rows) == set(column_names(encoding))
        for name, column in ours.read(split).items():
            torch.testing.assert_close(rows[name], column)
    for recording in (ours, everywhere):
        config = {"recording": recording.folder, "out": tmp_path / f"{recording.folder.name}.a"}
        fit(FitConfig.model_validate(config | {"rank": 4, "epochs": 1, "key_size": 16}))
    for name in ("head.safetensors", "memory/memory.safetensors"):
        one, other = (load_file(tmp_path / f"{kind}.a" / name) for kind in ("ours", "everywhere"))
        for part, values in one.items():
            assert torch.equal(values, other[part]), (name, part)


def test_sampling_follows_the_seed(expert: Path, texts: Path, tmp_path: Path) -> None:
    rows = [
        opened(expert, texts, tmp_path / name, encoding="sampled", seed=seed).read("train")
        for name, seed in (("a", 1), ("b", 1), ("c", 2))
    ]
    assert torch.equal(rows[0]["expert_sample_ids"], rows[1]["expert_sample_ids"])
    assert not torch.equal(rows[0]["expert_sample_ids"], rows[2]["expert_sample_ids"])


def test_an_empty_split_has_the_common_columns(
    lone_expert: Path, texts: Path, tmp_path: Path
) -> None:
    recording = opened(lone_expert, texts, tmp_path / "r")
    empty, full = recording.read("held_out"), recording.read("train")
    assert recording.manifest.splits["held_out"].tokens == 0
    assert set(empty) == set(COMMON_COLUMNS)
    for name, column in empty.items():
        assert column.dtype == full[name].dtype
        assert column.shape == (0, *full[name].shape[1:])


def test_max_tokens_holds_for_all_domain_text(expert: Path, texts: Path, tmp_path: Path) -> None:
    splits = opened(expert, texts, tmp_path / "r", max_tokens=300).manifest.splits
    assert splits["train"].tokens + splits["held_out"].tokens == 300
    assert splits["held_out"].tokens <= 60
    assert splits["general"].tokens > 100


def test_other_text_can_be_recorded(expert: Path, texts: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.txt"
    other.write_text("Another text that the expert has not seen.")
    recording = opened(expert, texts, tmp_path / "recording", data=(str(other),))
    assert [document.name for document in recording.documents("train")] == [str(other)]


def test_the_shipped_probe_text_is_recorded_by_default(expert: Path, tmp_path: Path) -> None:
    documents = probe_documents()
    names = {document.name for document in documents}
    assert len(names) == len(documents) > 10
    assert all(len(document.text) > 500 for document in documents)
    recording = Recording.open(record(RecordConfig(expert=expert, out=tmp_path / "r")).folder)
    assert {document.name for document in recording.documents("general")} == names


@pytest.mark.parametrize(
    ("encoding", "processes"),
    [("exact", 1), ("exact", 2), ("compact", 2), ("sparse", 1), ("sampled", 2)],
)
def test_killed_and_resumed_gives_the_same_bytes(
    encoding: str, processes: int, exact: Recording, expert: Path, texts: Path, tmp_path: Path
) -> None:
    whole = exact
    if encoding != "exact":
        whole = opened(expert, texts, tmp_path / "whole", encoding=encoding)
    out = tmp_path / "recording"
    config = recorded(expert, texts, out, encoding=encoding, processes=processes)
    child = started(record_slowly, config)
    deadline = time.monotonic() + 120
    while not (config.out / "train-00001.safetensors").exists():
        assert child.is_alive() and time.monotonic() < deadline
        time.sleep(0.002)
    copies = Path(f"/proc/{child.pid}/task/{child.pid}/children").read_text().split()
    assert len(copies) < processes
    child.kill()
    child.join()
    while any(Path(f"/proc/{copy}").exists() for copy in copies):
        assert time.monotonic() < deadline
        time.sleep(0.002)
    assert not (config.out / "recording.json").exists()
    with pytest.raises(RecordingError, match="unfinished"):
        Recording.open(config.out)
    first = {path: path.stat().st_mtime_ns for path in config.out.glob("*.safetensors")}
    record(config.model_copy(update={"processes": 3 - processes}))
    assert {path: path.stat().st_mtime_ns for path in first} == first
    assert contents(config.out) == contents(whole.folder)
    assert Recording.open(config.out).manifest.encoding.kind == encoding


@pytest.mark.parametrize("encoding", ["exact", "sparse", "sampled"])
def test_shards_written_behind_the_passes_are_the_same(
    encoding: str, expert: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[tuple[str, bool]] = []

    def spied(path: Path, columns: Mapping[str, torch.Tensor]) -> None:
        written.append((path.name, current_thread() is main_thread()))
        write_shard(path, columns)

    monkeypatch.setattr(sys.modules["trimtab.record"], "write_shard", spied)
    options = {"encoding": encoding, "processes": 1}
    one = opened(expert, texts, tmp_path / "one", **options)
    monkeypatch.setattr(sys.modules["trimtab.record"], "_is_on_gpu", lambda _: True)
    other = opened(expert, texts, tmp_path / "other", **options)
    assert contents(one.folder) == contents(other.folder)
    half = len(written) // 2
    assert half > 4 and {is_main for _, is_main in written[half:]} == {False}
    assert [name for name, _ in written[:half]] == [name for name, _ in written[half:]]


def test_a_full_disk_behind_the_passes_is_said_and_what_was_written_is_kept(
    exact: Recording, expert: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules["trimtab.record"], "_is_on_gpu", lambda _: True)
    config = recorded(expert, texts, tmp_path / "recording", processes=1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with monkeypatch.context() as limited:
        begun: list[Path] = []

        def limit(path: Path, columns: Mapping[str, torch.Tensor]) -> None:
            begun.append(path)
            if len(begun) == 3:
                resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
            write_shard(path, columns)

        limited.setattr(sys.modules["trimtab.record"], "write_shard", limit)
        try:
            with pytest.raises(StorageError, match="cannot write"):
                record(config)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    kept = {path: path.stat().st_mtime_ns for path in config.out.glob("*.safetensors")}
    assert len(kept) == 2
    record(config)
    assert contents(config.out) == contents(exact.folder)
    assert {path: path.stat().st_mtime_ns for path in kept} == kept


@given(
    st.lists(st.integers(1, 700), min_size=1, max_size=30),
    st.integers(2, 300),
    st.integers(1, 1000),
)
def test_shards_hold_every_passage_in_order_and_are_nearly_equal(
    lengths: list[int], window: int, shard_tokens: int
) -> None:
    documents = [
        DocumentTokens(str(number), np.arange(length, dtype=np.int32))
        for number, length in enumerate(lengths)
    ]
    shards = cut_shards(documents, window=window, stride=window, shard_tokens=shard_tokens)
    expected = [
        Passage(number, *where)
        for number, length in enumerate(lengths)
        for where in passages(length, window, window)
    ]
    assert [passage for shard in shards for passage in shard] == expected
    sizes, longest = [rows_of(shard) for shard in shards], max(one.rows for one in expected)
    assert all(
        size <= shard_tokens or len(shard) == 1 for size, shard in zip(sizes, shards, strict=True)
    )
    assert max(sizes) <= sum(sizes) / len(sizes) + longest
    if longest <= shard_tokens / 2:
        assert len(shards) <= 1.1 * 2 * -(-sum(sizes) // shard_tokens) + 2


def test_a_finished_folder_needs_no_model(expert: Path, texts: Path, tmp_path: Path) -> None:
    moved = tmp_path / "expert"
    shutil.copytree(expert, moved)
    config = recorded(expert, texts, tmp_path / "recording")
    result = record(config)
    shutil.rmtree(moved / "lora")
    before = contents(config.out)
    assert record(config.model_copy(update={"expert": moved})) == result
    assert contents(config.out) == before
    assert f"{result.tokens:,} tokens" in result.summary()


def test_other_settings_or_text_are_refused(expert: Path, texts: Path, tmp_path: Path) -> None:
    general = tmp_path / "general.txt"
    general.write_text("Some general text.")
    config = recorded(expert, texts, tmp_path / "recording", general=(str(general),))
    record(config)
    with pytest.raises(InputError, match="stride_tokens is 32, was 40"):
        record(config.model_copy(update={"stride_tokens": 32}))
    general.write_text("Some other text.")
    with pytest.raises(InputError, match="general changed since"):
        record(config)


def test_an_unfinished_run_of_other_settings_is_refused(
    expert: Path, texts: Path, tmp_path: Path
) -> None:
    config = recorded(expert, texts, tmp_path / "recording", window_tokens=4096)
    with pytest.raises(InputError, match="2048 positions"):
        record(config)
    with pytest.raises(InputError, match="window_tokens is 64, was 4096"):
        record(config.model_copy(update={"window_tokens": 64}))


def test_a_folder_with_other_things_is_left_alone(
    expert: Path, texts: Path, tmp_path: Path
) -> None:
    (tmp_path / "letter.txt").write_text("mine")
    with pytest.raises(InputError, match=r"holds other things \(letter.txt\)"):
        record(recorded(expert, texts, tmp_path))
    assert contents(tmp_path).keys() == {"letter.txt"}


def test_a_folder_without_an_expert_is_refused(texts: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no expert"):
        record(recorded(tmp_path / "nothing", texts, tmp_path / "recording"))


@pytest.fixture
def copy(exact: Recording, tmp_path: Path) -> Path:
    return Path(shutil.copytree(exact.folder, tmp_path / "copy"))


def test_any_changed_byte_is_found(copy: Path) -> None:
    payload = sorted(path for path in copy.iterdir() if path.name != "recording.json")
    assert "documents.json" in {path.name for path in payload}
    for path in payload:
        whole = path.read_bytes()
        path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        with pytest.raises(RecordingError, match=f"{path.name} was changed"):
            Recording.open(copy)
        Recording.open(copy, verify=False)
        path.write_bytes(whole[:-1])
        with pytest.raises(RecordingError, match="bytes, expected"):
            Recording.open(copy, verify=False)
        path.write_bytes(whole)
    Recording.open(copy)


def test_a_missing_shard_is_named(copy: Path) -> None:
    (copy / "train-00001.safetensors").unlink()
    with pytest.raises(RecordingError, match=r"train-00001.safetensors is missing"):
        Recording.open(copy, verify=False)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format_version": 2}, "format version 2"),
        ({"format": "zip"}, "format 'zip'"),
        ({"colour": "red"}, "colour"),
        ({"vocab": "many"}, "vocab"),
        ({"encoding": {"kind": "pickle"}}, "encoding"),
    ],
)
def test_a_manifest_that_cannot_be_is_refused(
    copy: Path, change: dict[str, object], message: str
) -> None:
    path = copy / "recording.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(RecordingError, match=message):
        Recording.open(copy)


def rewritten(folder: Path, old: str, new: str) -> None:
    path = folder / "recording.json"
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new, 1))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"documents.json": {', '"../documents.json": {'),
        ('"documents.json": {', '"unembedding-expert.safetensors": {'),
        ('"file": "train-00001', '"file": "../train-00001'),
        ('"file": "train-00001', '"file": "train-00000'),
        ('"expert_head": null', '"expert_head": {"scale": 1.0}'),
        ('"rows": ', '"rows": 9'),
    ],
)
def test_a_manifest_that_contradicts_itself_is_refused(copy: Path, old: str, new: str) -> None:
    rewritten(copy, old, new)
    with pytest.raises(RecordingError, match=r"recording.json: "):
        Recording.open(copy)


def test_a_broken_list_of_documents_is_refused(copy: Path) -> None:
    path = copy / "documents.json"
    size = path.stat().st_size
    path.write_text('{"train": [{"name": 3}]}'.ljust(size))
    recording = Recording.open(copy, verify=False)
    for split in ("train", "general"):
        with pytest.raises(RecordingError, match="list of documents"):
            recording.documents(split)


def test_an_unfinished_run_names_the_shard_that_is_broken(
    exact: Recording, expert: Path, texts: Path, copy: Path
) -> None:
    (copy / "recording.json").unlink()
    partial = {"config": exact.manifest.config, "inputs": exact.manifest.inputs}
    partial |= {"packages": exact.manifest.packages}
    write_json(copy / "partial.json", partial)
    (copy / "train-00001.safetensors").write_bytes(b"broken")
    with pytest.raises(RecordingError, match=r"train-00001\.safetensors") as said:
        record(recorded(expert, texts, copy))
    assert "delete that file" in said.value.hint
    (copy / "train-00001.safetensors").unlink()
    record(recorded(expert, texts, copy))
    assert contents(copy) == contents(exact.folder)


def test_a_column_of_another_encoding_is_refused(exact: Recording) -> None:
    with pytest.raises(RecordingError, match="'exact' and for train no column expert_top_ids"):
        exact.read("train", ["token_ids", "expert_top_ids"])
    with pytest.raises(RecordingError, match="for general no column expert_hidden") as refused:
        exact.read("general", ["expert_hidden"])
    assert "--data" in str(refused.value.hint)


def test_the_manifest_states_its_origin(exact: Recording, expert: Path) -> None:
    manifest = exact.manifest
    base = json.loads((expert / "expert.json").read_text())["base"]
    assert manifest.base.model_dump() == base
    assert manifest.contains_text
    assert manifest.config["window_tokens"] == 64
    assert set(manifest.inputs) == {"expert", "general"}
    assert manifest.packages["torch"] == metadata.version("torch")


def test_large_states_are_kept_as_float32() -> None:
    large, small = torch.tensor([[1.0, 7e4]]), torch.tensor([[2.0, 3.0]])
    columns = state_columns(large, small)
    assert {column.dtype for column in columns.values()} == {torch.float32}
    assert torch.equal(columns["reference_hidden"], large)
    assert state_columns(large)["reference_hidden"].dtype == torch.float32
    assert state_columns(small, small)["expert_hidden"].dtype == torch.float16


def test_a_full_fine_tune_has_its_own_head(full_expert: Path, expert: Path) -> None:
    full, lora = (open_pair(folder, dtype="float32") for folder in (full_expert, expert))
    assert not Heads(full.reference_unembedding, full.expert_unembedding).same
    assert Heads(lora.reference_unembedding, lora.expert_unembedding).same


def test_states_that_are_not_finite_stop_the_run(expert: Path) -> None:
    pair = open_pair(expert, dtype="float32")
    with torch.no_grad():
        pair.reference.model.get_input_embeddings().weight[ord("T")] = torch.nan
    documents = tokenised(
        [Document("a.txt", SENTENCES)],
        lambda document: pair.reference.encode(document.text),
        max_tokens=None,
        seed=0,
    )
    shard = cut_shards(documents, window=64, stride=64, shard_tokens=256)[0]
    with pytest.raises(NumericalError, match=r"states on a.txt are not finite"):
        run_passages(pair, documents, shard, advance=lambda _: None)
