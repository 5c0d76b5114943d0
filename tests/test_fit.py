"""Fitting adapters to recordings of a real tiny pair."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from trimtab.backends.open import open_model
from trimtab.config import FitConfig, MountConfig, RecordConfig, TuneConfig
from trimtab.errors import AdapterError, InputError, RecordingError
from trimtab.fit import FitResult, fit
from trimtab.fitting import host_head
from trimtab.fitting.host_head import prepare
from trimtab.fitting.recorded import byte_ends, document_bytes, expert_logits
from trimtab.mount import mount
from trimtab.record import record
from trimtab.steering.host_states import host_states, same_bytes
from trimtab.steering.scoring import Steers, score_document
from trimtab.store.adapter import read_head, read_memory, read_mount
from trimtab.store.manifest import read_manifest
from trimtab.store.recording import Recording
from trimtab.tune import tune
from trimtab.types import silent
from trimtab.vocab import Vocabulary

SMALL = "tiny:llama?hidden=48&vocab=bpe"
HOST = "tiny:qwen3?hidden=32"
DOMAIN = "The trim tab turns the rudder, and the rudder turns the ship.\n"
GENERAL = "Plain prose about nothing in particular, written down by nobody. "
QUICK = {
    "carriers": ("head", "memory"),
    "rank": 4,
    "epochs": 2,
    "active_tokens": 128,
    "key_size": 16,
    "anchors": 512,
}


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_texts(tmp_path_factory.mktemp("texts"))


def write_texts(folder: Path) -> Path:
    for number in range(4):
        (folder / f"{number}.txt").write_text(f"{number}. {DOMAIN * 5}")
        (folder / f"{number}.md").write_text(f"{number}. {GENERAL * 2}Ende äöü.")
    return folder


def tuned(texts: Path, method: str, *, model: str = SMALL) -> Path:
    config = {
        "model": model,
        "data": (str(texts / "*.txt"),),
        "out": texts / method,
        "method": method,
        "learning_rate": 1e-2,
        "epochs": 8,
        "window_tokens": 64,
        "batch_windows": 1,
        "held_out": 0.25,
        "validations": 1,
        "dtype": "float32",
    }
    return tune(TuneConfig.model_validate(config)).folder


def recorded(expert: Path, encoding: str = "exact") -> Path:
    config = {
        "expert": expert,
        "out": expert.parent / f"{expert.name}-{encoding}",
        "general": (str(expert.parent / "*.md"),),
        "encoding": encoding,
        "dtype": "float32",
    }
    return record(RecordConfig.model_validate(config)).folder


@pytest.fixture(scope="module")
def recordings(texts: Path) -> dict[str, Path]:
    """Of an expert that was tuned whole: tiny random embeddings leave a LoRA hardly any say."""
    expert = tuned(texts, "full")
    return {name: recorded(expert, name) for name in ("exact", "sparse", "sampled")}


@pytest.fixture(scope="module")
def lora_recording(texts: Path) -> Path:
    return recorded(tuned(texts, "lora"))


def fitted(recording: Path, out: Path, **options: object) -> FitResult:
    config = {"recording": recording, "out": out, **QUICK, **options}
    return fit(FitConfig.model_validate(config))


def nats(adapter: Path, host_ref: str, text: str) -> dict[str, float]:
    """What each predictor pays for a text on a host."""
    host = open_model(host_ref, dtype="float32")
    config = MountConfig(adapter=adapter, host=host_ref, cache=False)
    mounted = mount(config, host=host)
    steers = Steers(head=mounted.head, memory=mounted.memory)
    scored = score_document(host, text, steers, window_tokens=256, stride_tokens=128)
    return {name: -float(logprobs.mean()) for name, logprobs in scored.logprobs.items()}


def payload(folder: Path) -> dict[str, bytes]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(p.relative_to(folder)): p.read_bytes() for p in files if p.suffix != ".md"}


def test_the_same_settings_give_the_same_bytes(recordings: dict[str, Path], tmp_path: Path) -> None:
    one, two = (fitted(recordings["exact"], tmp_path / name) for name in ("one", "two"))
    made, again = payload(one.folder), payload(two.folder)
    for files in (made, again):
        told = json.loads(files["manifest.json"])
        del told["created"]
        files["manifest.json"] = json.dumps(told).encode()
    assert made == again
    assert "head: " in one.summary() and str(one.folder) in one.summary()


def test_a_step_too_small_to_move_leaves_the_host_alone(
    recordings: dict[str, Path], tmp_path: Path
) -> None:
    out = fitted(recordings["exact"], tmp_path / "a", carriers=("head",), learning_rate=1e-9).folder
    paid = nats(out, HOST, DOMAIN)
    assert paid["head"] == pytest.approx(paid["host"], abs=1e-4)


@pytest.mark.parametrize("values", ["hard", "soft"])
@pytest.mark.parametrize("encoding", ["exact", "sparse", "sampled"])
def test_each_encoding_is_enough(
    encoding: str, values: str, recordings: dict[str, Path], tmp_path: Path
) -> None:
    if (encoding, values) == ("sampled", "soft"):
        with pytest.raises(InputError, match="this one is sampled"):
            fitted(recordings[encoding], tmp_path / "a", values=values)
        assert not (tmp_path / "a" / "manifest.json").exists()
        return
    options = {"values": values, "learning_rate": 1e-2, "epochs": 4}
    made = fitted(recordings[encoding], tmp_path / "a", **options)
    memory = read_memory(made.folder, made.manifest).memory
    assert made.manifest.memory and made.manifest.memory.values == values
    assert len(memory) == made.manifest.memory.entries
    if values == "soft":
        assert memory.soft_ids is not None and memory.soft_probs is not None
        assert 0.5 < float(memory.soft_probs.sum(1).mean()) <= 1.001
        assert memory.soft_ids.max() < len(memory.soft_strings)
    paid = nats(made.folder, SMALL, DOMAIN * 2)
    assert paid["head"] < paid["host"]


def test_soft_values_are_the_experts(recordings: dict[str, Path], tmp_path: Path) -> None:
    made = fitted(recordings["exact"], tmp_path / "a", values="soft", carriers=("memory",))
    memory = read_memory(made.folder, made.manifest).memory
    recording = Recording.open(recordings["exact"])
    train, base = recording.read("train"), open_model(SMALL, dtype="float32")
    answered = train["next_ids"] >= 0
    states = train["expert_hidden"][answered].float()
    head = recording.expert_unembedding()
    assert head is not None
    probs = head.logits(states).softmax(-1)
    assert memory.soft_ids is not None and memory.soft_probs is not None
    for entry in (0, 7, len(memory) - 1):
        likely = probs[entry].topk(8)
        strings = [base.vocabulary.token_bytes[i] or b"" for i in likely.indices.tolist()]
        kept = [memory.soft_strings[i] for i in memory.soft_ids[entry].tolist()]
        assert kept == strings
        torch.testing.assert_close(memory.soft_probs[entry], likely.values, atol=1e-3, rtol=1e-3)


def test_the_memory_holds_the_training_text(recordings: dict[str, Path], tmp_path: Path) -> None:
    made = fitted(recordings["exact"], tmp_path / "a", carriers=("memory",))
    file = read_memory(made.folder, made.manifest)
    base, train = open_model(SMALL), Recording.open(recordings["exact"]).read("train")
    raw = file.memory.text.numpy().tobytes()
    answered = train["next_ids"] >= 0
    following = train["next_ids"][answered].tolist()
    for position, token in zip(file.memory.positions.tolist(), following, strict=True):
        assert raw[position:].startswith(base.vocabulary.token_bytes[token] or b"?")
    general = Recording.open(recordings["exact"]).read("general")
    own = file.memory.features(general["reference_hidden"].float())
    torch.testing.assert_close(file.probe_features, own, atol=1e-2, rtol=1e-2)


CHOICES = [("head",), ("memory",), ("expert",), ("head", "expert"), ("head", "memory", "expert")]


@pytest.mark.parametrize("carriers", CHOICES, ids="+".join)
def test_only_the_carriers_asked_for_are_made(
    carriers: tuple[str, ...], lora_recording: Path, tmp_path: Path
) -> None:
    made = fitted(lora_recording, tmp_path / "a", carriers=carriers)
    manifest = read_manifest(made.folder)
    assert tuple(manifest.carriers) == carriers
    assert manifest.contains_text is ("memory" in carriers)
    assert read_mount(made.folder)[1].documents
    assert b"trim tab" not in b"".join(payload(made.folder).values()) or "memory" in carriers


def test_the_probe_says_what_was_read(recordings: dict[str, Path], tmp_path: Path) -> None:
    made = fitted(recordings["exact"], tmp_path / "a", carriers=("head",))
    _, probe = read_mount(made.folder)
    recording = Recording.open(recordings["exact"])
    general, small = recording.read("general"), open_model(SMALL).vocabulary
    texts = [f"{number}. {GENERAL * 2}Ende äöü.".encode() for number in range(4)]
    assert list(probe.documents) == texts == document_bytes(small, general)
    for row in (0, 5, len(probe.byte_ends) - 1):
        read = texts[probe.document_index[row]][: probe.byte_ends[row]]
        assert read.endswith(small.token_bytes[general["token_ids"][row]] or b"?")


def test_a_part_of_the_recording_is_its_beginning(
    recordings: dict[str, Path], tmp_path: Path
) -> None:
    made = fitted(recordings["exact"], tmp_path / "a", carriers=("memory",), max_tokens=256)
    train = Recording.open(recordings["exact"]).read("train")
    assert len(train["token_ids"]) > 256
    kept = train["next_ids"][:255] >= 0
    assert made.manifest.memory and made.manifest.memory.entries == int(kept.sum())


def test_a_changed_or_unfinished_recording_is_refused(
    recordings: dict[str, Path], tmp_path: Path
) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(recordings["exact"], broken)
    shard = next(broken.glob("train-*.safetensors"))
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    with pytest.raises(RecordingError, match="was changed"):
        fitted(broken, tmp_path / "a")
    (broken / "recording.json").unlink()
    with pytest.raises(RecordingError):
        fitted(broken, tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_other_settings_in_the_same_folder_lose_nothing(
    recordings: dict[str, Path], tmp_path: Path
) -> None:
    fitted(recordings["exact"], tmp_path / "a", carriers=("head",))
    before = payload(tmp_path / "a")
    assert fitted(recordings["exact"], tmp_path / "a", carriers=("head",)).folder == tmp_path / "a"
    with pytest.raises(InputError, match="fitted with other settings"):
        fitted(recordings["exact"], tmp_path / "a", carriers=("head",), rank=5)
    with pytest.raises(InputError, match="fitted with other settings"):
        fitted(recordings["sparse"], tmp_path / "a", carriers=("head",))
    assert payload(tmp_path / "a") == before


@pytest.mark.parametrize("encoding", ["exact", "sparse", "sampled"])
def test_a_head_fitted_on_a_host_helps_it(
    encoding: str, recordings: dict[str, Path], tmp_path: Path
) -> None:
    options = {"epochs": 12, "learning_rate": 3e-2, "carriers": ("head",), "dtype": "float32"}
    made = fitted(recordings[encoding], tmp_path / "a", host=HOST, rank=8, **{**options})
    head = made.manifest.head
    assert head and head.host == HOST and head.hidden == 32
    assert read_head(made.folder).strings == ()
    paid = nats(made.folder, HOST, DOMAIN * 3)
    assert paid["head"] < paid["host"] - 0.3
    general = nats(made.folder, HOST, GENERAL * 2)
    assert general["head"] - general["host"] < paid["host"] - paid["head"]


def test_a_host_head_is_refused_elsewhere_and_its_memory_is_not(
    recordings: dict[str, Path], tmp_path: Path
) -> None:
    made = fitted(recordings["exact"], tmp_path / "a", host=HOST, carriers=("head", "memory"))
    other = "tiny:qwen3?hidden=32&seed=1"
    seat = {"adapter": made.folder, "host": other, "cache": False}
    with pytest.raises(AdapterError, match="works on no other") as refused:
        mount(MountConfig.model_validate(seat))
    assert HOST in refused.value.hint
    mounted = mount(MountConfig.model_validate(seat | {"carriers": ("memory",)}))
    assert mounted.head is None and mounted.memory is not None


def test_a_host_without_a_head_to_fit_is_refused(
    recordings: dict[str, Path], tmp_path: Path
) -> None:
    with pytest.raises(InputError, match="no head is made"):
        fitted(recordings["exact"], tmp_path / "a", host=HOST, carriers=("memory",))


def test_a_host_fit_target_is_the_expert_in_the_hosts_tokens(recordings: dict[str, Path]) -> None:
    recording = Recording.open(recordings["exact"])
    small, host = (open_model(ref, dtype="float32") for ref in (SMALL, HOST))
    splits = {name: recording.read(name) for name in ("train", "general")}
    prepared = prepare(host, small.vocabulary, splits, silent)
    expert = expert_logits(recording, splits["train"], small.unembedding)
    active = prepared.active(300)
    data = prepared.head_data(prepared.expert_targets(expert, active), active, 0.25)
    row = torch.tensor([11])
    probs = expert(prepared.small_rows[row], torch.arange(512)).softmax(-1)[0].detach()
    # A byte is as likely as all small tokens that begin with it, among tokens of text.
    by_byte = torch.zeros(256)
    for token_id, text in enumerate(small.vocabulary.token_bytes):
        if text:
            by_byte[text[0]] += probs[token_id]
    target = data.target_logits(row)[0].softmax(-1)
    found = torch.zeros(256)
    for place, token_id in enumerate(active.tolist()):
        found[(host.vocabulary.token_bytes[token_id] or b"\0")[0]] += target[place]
    torch.testing.assert_close(found, by_byte / by_byte.sum(), atol=1e-4, rtol=1e-3)
    general = torch.tensor([len(prepared.small_rows) + 3])
    torch.testing.assert_close(data.target_logits(general), data.base_logits(general))
    assert data.weight[row] == 1 and data.weight[general] == 0.25


def test_states_are_paired_where_the_same_bytes_were_read(recordings: dict[str, Path]) -> None:
    recording = Recording.open(recordings["exact"])
    train, small = recording.read("train"), open_model(SMALL).vocabulary
    host = open_model("tiny:gemma2?vocab=bpe")
    texts = document_bytes(small, train)
    states = host_states(host, texts, "reading", silent)
    ends = byte_ends(small, train)
    rows, host_rows = same_bytes(train["document_index"], ends, states)
    # Both use the same tokenizer, so that every position has its pair.
    assert len(rows) == len(ends) == len(states.hidden)
    assert torch.equal(train["token_ids"][rows].long(), states.token_ids[host_rows])
    whole = host.hidden(torch.tensor([host.context_ids() + host.encode(texts[0].decode())]))[0]
    torch.testing.assert_close(states.hidden[: len(whole) - 1], whole[1:], atol=1e-4, rtol=1e-4)


def test_an_expert_that_was_tuned_whole_is_no_lora_to_copy(
    recordings: dict[str, Path], tmp_path: Path
) -> None:
    with pytest.raises(InputError, match="expert carrier is a copy"):
        fitted(recordings["exact"], tmp_path / "a", carriers=("expert",))


def test_targets_that_do_not_fit_are_computed_in_each_pass(
    recordings: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"host": HOST, "carriers": ("head",), "dtype": "float32"}
    kept = read_head(fitted(recordings["exact"], tmp_path / "kept", **options).folder).head
    monkeypatch.setattr(host_head, "KEPT_BYTES", 0)
    anew = read_head(fitted(recordings["exact"], tmp_path / "anew", **options).folder).head
    torch.testing.assert_close(kept.offset, anew.offset, atol=1e-3, rtol=0.05)
    torch.testing.assert_close(kept.up, anew.up, atol=1e-3, rtol=0.05)


def test_a_tokenizers_own_first_space_is_not_in_the_text() -> None:
    vocabulary = Vocabulary((b" The", b" cat", b"!", None), prefix_space=True)
    columns = {
        "token_ids": torch.tensor([0, 1, 0, 2]),
        "document_index": torch.tensor([0, 0, 1, 1]),
    }
    assert document_bytes(vocabulary, columns) == [b"The cat", b"The!"]
    assert byte_ends(vocabulary, columns).tolist() == [3, 7, 3, 4]
