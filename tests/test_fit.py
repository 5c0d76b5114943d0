"""Fitting adapters to recordings of a real tiny pair."""

import json
import math
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from trimtab.backends.hf import HFModel
from trimtab.backends.open import open_model
from trimtab.carriers.head import Head
from trimtab.config import FitConfig, MountConfig, RecordConfig, TuneConfig
from trimtab.errors import AdapterError, InputError, RecordingError
from trimtab.fit import FitResult, fit
from trimtab.fitting import host_head
from trimtab.fitting.host_head import Followed, HostFit, prepare
from trimtab.fitting.recorded import (
    SmallLogits,
    byte_ends,
    document_bytes,
    expert_logits,
    reference_logits,
)
from trimtab.losses import kl_nats
from trimtab.mount import mount
from trimtab.record import record
from trimtab.steering.host_states import host_states, same_bytes
from trimtab.steering.predictors import Steering
from trimtab.steering.scoring import score_document
from trimtab.store.adapter import read_head, read_memory, read_mount
from trimtab.store.files import lock
from trimtab.store.manifest import read_manifest
from trimtab.store.recording import Recording
from trimtab.tune import tune
from trimtab.types import Advance, silent
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


def recorded(expert: Path, encoding: str = "exact", **options: object) -> Path:
    config = {
        "expert": expert,
        "out": expert.parent / f"{expert.name}-{encoding}",
        "general": (str(expert.parent / "*.md"),),
        "encoding": encoding,
        "dtype": "float32",
    }
    return record(RecordConfig.model_validate(config | options)).folder


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
    heads = {"head": mounted.head} if mounted.head else {}
    memories = {"memory": mounted.memory} if mounted.memory else {}
    steering = Steering(("host", "head", "memory", "head+memory"), heads, memories)
    scored = score_document(host, text, steering, window_tokens=256, stride_tokens=128)
    return {name: -float(row.logprobs.mean()) for name, row in scored.rows.items()}


def payload(folder: Path) -> dict[str, bytes]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(p.relative_to(folder)): p.read_bytes() for p in files if p.suffix != ".md"}


def test_the_same_settings_give_the_same_bytes(recordings: dict[str, Path], tmp_path: Path) -> None:
    one, two = (fitted(recordings["exact"], tmp_path / name) for name in ("one", "two"))
    made, again = payload(one.folder), payload(two.folder)
    for files in (made, again):
        told = json.loads(files["manifest.json"])
        assert told["name"] in ("one", "two")
        # The card names the adapter.
        del told["created"], told["name"], told["files"]["README.md"]
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
        torch.testing.assert_close(
            memory.soft_probs[entry].float(), likely.values, atol=1e-3, rtol=1e-3
        )


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


def test_a_second_fit_of_a_folder_waits_for_the_first(lora_recording: Path, tmp_path: Path) -> None:
    recording = recorded(lora_recording.parent / "lora", "compact")
    config = {"recording": recording, "out": tmp_path / "a", **QUICK}
    begun: list[str] = []

    @contextmanager
    def meanwhile(label: str, total: int) -> Iterator[Advance]:
        begun.append(label)
        if len(begun) == 1:
            with pytest.raises(InputError, match="another run is writing"):
                fitted(recording, tmp_path / "a", rank=5)
        yield lambda _: None

    fit(FitConfig.model_validate(config), progress=meanwhile)
    assert begun
    assert read_manifest(tmp_path / "a").provenance.fit["rank"] == 4


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


@dataclass(frozen=True)
class Prepared:
    """A recording as a host-fit reads it."""

    small: HFModel
    expert: SmallLogits
    reference: SmallLogits
    texts: list[str]
    fit: HostFit

    def by_byte(self, probs: Tensor) -> Tensor:
        """Probability of the next byte: of all small tokens that begin with it."""
        found = torch.zeros(256)
        for token_id, text in enumerate(self.small.vocabulary.token_bytes):
            if text:
                found[text[0]] += probs[token_id]
        return found / found.sum()


@pytest.fixture(scope="module")
def prepared(recordings: dict[str, Path]) -> Prepared:
    recording = Recording.open(recordings["exact"])
    small, host = (open_model(ref, dtype="float32") for ref in (SMALL, HOST))
    splits = {name: recording.read(name) for name in ("train", "general")}
    train = splits["train"]
    return Prepared(
        small,
        expert_logits(recording, train, small.unembedding),
        reference_logits(train, small.unembedding),
        [text.decode() for text in document_bytes(small.vocabulary, train)],
        prepare(host, small, splits, silent),
    )


def byte_order(prepared: Prepared, active: Tensor, logits: Tensor) -> Tensor:
    """Probabilities of active tokens of a host of bytes, by byte."""
    found = torch.zeros(256)
    for place, token_id in enumerate(active.tolist()):
        byte = prepared.fit.host.vocabulary.token_bytes[token_id]
        assert byte
        found[byte[0]] = logits.softmax(-1)[place]
    return found


def test_a_host_fit_target_is_the_expert_in_the_hosts_tokens(prepared: Prepared) -> None:
    fit, row = prepared.fit, torch.tensor([11])
    active = fit.active(300)
    data = fit.head_data(fit.soft_targets(active, prepared.expert), active, 0.25)
    probs = prepared.expert(fit.small_rows[row], None).softmax(-1)[0].detach()
    every = torch.arange(len(active))
    target = byte_order(prepared, active, data.logits(row, every)[1][0])
    torch.testing.assert_close(target, prepared.by_byte(probs), atol=1e-4, rtol=1e-3)
    general = torch.tensor([len(fit.small_rows) + 3])
    torch.testing.assert_close(*data.logits(general, every))
    some = every[3:40:7]
    for part, whole in zip(data.logits(row, some), data.logits(row, every), strict=True):
        torch.testing.assert_close(part, whole[:, some])
    assert data.weight[row] == 1 and data.weight[general] == 0.25


def test_a_blend_target_is_host_expert_and_reference_at_the_same_bytes(prepared: Prepared) -> None:
    fit = prepared.fit
    active = fit.active(300)
    followed = fit.soft_targets(active, prepared.expert, prepared.reference)
    assert torch.equal(followed.rows, fit.host_rows)
    for place in (0, 11, len(fit.host_rows) - 2):
        row = torch.tensor([place])
        document = int(fit.train.document_index[fit.host_rows[place]])
        read = prepared.texts[document][: int(fit.train.byte_ends[fit.host_rows[place]])]
        # All three as they are when they have read this text alone.
        host_logits = fit.host.logits(torch.tensor([fit.host.encode(read)]))[0, -1]
        host_probs = host_logits[:256].softmax(-1)
        small = prepared.small
        reference_probs = small.logits(torch.tensor([small.encode(read)]))[0, -1].softmax(-1)
        expert_probs = prepared.expert(fit.small_rows[row], None).softmax(-1)[0].detach()
        expert_bytes, reference_bytes = map(prepared.by_byte, (expert_probs, reference_probs))
        expected = host_probs.sqrt() * expert_bytes / reference_bytes.sqrt()
        assert not torch.allclose(expected / expected.sum(), expert_bytes, atol=1e-2)
        target = byte_order(prepared, active, followed.logits(row)[0])
        torch.testing.assert_close(target, expected / expected.sum(), atol=1e-4, rtol=5e-3)


def text_nats(host: HFModel, texts: list[str], active: Tensor) -> list[float]:
    """What a host pays for each token but the first of each text, among the active tokens."""
    paid = []
    for text in texts:
        ids = host.encode(text)
        logits = host.logits(torch.tensor([host.context_ids() + ids]))[0]
        for place, token_id in enumerate(ids[1:], start=1):
            row = logits[len(host.context_ids()) + place - 1, active].double()
            total = sum(math.exp(logit) for logit in row.tolist())
            paid.append(math.log(total) - float(row[active.tolist().index(token_id)]))
    return paid


def test_labels_are_all_next_tokens_and_the_loss_their_cross_entropy(prepared: Prepared) -> None:
    fit = prepared.fit
    active = fit.active(300)
    followed = fit.label_targets(active)
    assert len(followed.rows) == sum(len(text.encode()) - 1 for text in prepared.texts)
    assert len(followed.rows) > len(fit.small_rows)
    data = fit.head_data(followed, active, 0.25)
    places = torch.arange(len(followed.rows))
    every = torch.arange(len(active))
    base, target = data.logits(places, every)
    loss = kl_nats(target, base)
    expected = torch.tensor(text_nats(fit.host, prepared.texts, active))
    torch.testing.assert_close(loss, expected, atol=1e-4, rtol=1e-4)
    general = places[-1:] + 3
    torch.testing.assert_close(*data.logits(general, every))
    assert data.weight[0] == 1 and data.weight[general] == 0.25


def test_a_label_outside_the_active_tokens_is_passed_over(prepared: Prepared) -> None:
    fit, few = prepared.fit, prepared.fit.active(5)
    read = {int(i) for i in few}
    followed = fit.label_targets(few)
    texts = [text.encode() for text in prepared.texts]
    assert len(followed.rows) == sum(byte in read for text in texts for byte in text[1:])
    labels = few[followed.logits(torch.arange(len(followed.rows))).argmax(-1)]
    assert torch.equal(labels, fit.train.token_ids[followed.rows + 1])
    with pytest.raises(InputError, match="no document of the recorded text has a next token"):
        fit.label_targets(torch.tensor([0]))


LONG = {"epochs": 60, "learning_rate": 3e-2, "rank": 8, "dtype": "float32"}


@torch.no_grad()
def distances_nats(fit: HostFit, followed: Followed, heads: dict[str, Head]) -> dict[str, float]:
    """Mean KL from what is followed to the host under each head, "" being none."""
    active, places = fit.active(300), torch.arange(len(followed.rows))
    wanted = followed.logits(places)
    states, rows = fit.train.hidden[followed.rows], fit.host.unembedding.weight[active]
    base = fit.host.unembedding.logits(states, active)
    shifts = {name: head.shift(states) @ rows.T for name, head in heads.items()}
    shifted = {"": base} | {name: base + shift for name, shift in shifts.items()}
    return {name: float(kl_nats(wanted, logits).mean()) for name, logits in shifted.items()}


def test_each_head_comes_nearest_to_what_it_followed(
    prepared: Prepared, recordings: dict[str, Path], tmp_path: Path
) -> None:
    fit, active = prepared.fit, prepared.fit.active(300)
    followed = {
        "expert": fit.soft_targets(active, prepared.expert),
        "blend": fit.soft_targets(active, prepared.expert, prepared.reference),
        "labels": fit.label_targets(active),
    }
    heads = {}
    for targets in followed:
        options = LONG | {"host": HOST, "carriers": ("head",), "targets": targets}
        made = fitted(recordings["exact"], tmp_path / targets, **options)
        assert made.manifest.provenance.fit["targets"] == targets
        heads[targets] = read_head(made.folder).head
    for targets, target in followed.items():
        distance = distances_nats(fit, target, heads)
        assert min(distance, key=lambda name: distance[name]) == targets
        assert distance[targets] < 0.5 * distance[""]


def test_labels_become_likelier_in_the_training_text(
    prepared: Prepared, recordings: dict[str, Path], tmp_path: Path
) -> None:
    options = LONG | {"host": HOST, "carriers": ("head",), "targets": "labels"}
    made = fitted(recordings["exact"], tmp_path / "a", **options)
    for text in prepared.texts:
        paid = nats(made.folder, HOST, text)
        assert paid["head"] < 0.5 * paid["host"]


@pytest.mark.parametrize("encoding", ["exact", "sparse", "sampled"])
def test_a_head_that_follows_the_blend_helps_its_host(
    encoding: str, recordings: dict[str, Path], tmp_path: Path
) -> None:
    options = {"epochs": 12, "learning_rate": 3e-2, "carriers": ("head",), "dtype": "float32"}
    options |= {"host": HOST, "rank": 8, "targets": "blend"}
    paid = nats(fitted(recordings[encoding], tmp_path / "a", **options).folder, HOST, DOMAIN * 3)
    assert paid["head"] < paid["host"] - 0.3


def test_an_adapter_from_before_targets_was_fitted_to_the_expert(
    recordings: dict[str, Path], tmp_path: Path
) -> None:
    options = {"host": HOST, "carriers": ("head",)}
    made = fitted(recordings["exact"], tmp_path / "a", **options)
    path = made.folder / "manifest.json"
    older = json.loads(path.read_text())
    del older["provenance"]["fit"]["targets"]
    path.write_text(json.dumps(older))
    before = payload(made.folder)
    fitted(recordings["exact"], tmp_path / "a", **options)
    assert payload(made.folder) == before
    with pytest.raises(InputError, match="fitted with other settings"):
        fitted(recordings["exact"], tmp_path / "a", targets="labels", **options)


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


@pytest.fixture
def movable(lora_recording: Path, tmp_path: Path) -> tuple[Path, Path]:
    """A recording and its expert, which a test may harm."""
    expert = Path(shutil.copytree(lora_recording.parent / "lora", tmp_path / "expert"))
    recording = Path(shutil.copytree(lora_recording, tmp_path / "recording"))
    told = json.loads((recording / "recording.json").read_text())
    told["config"]["expert"] = str(expert)
    (recording / "recording.json").write_text(json.dumps(told))
    return recording, expert


@pytest.mark.parametrize("harm", ["tuned anew", "gone", "changed"])
def test_the_expert_that_is_carried_is_the_one_that_was_recorded(
    harm: str, movable: tuple[Path, Path], tmp_path: Path
) -> None:
    recording, expert = movable
    if harm == "tuned anew":
        other = json.loads((expert / "expert.json").read_text()) | {"seed": 7}
        (expert / "expert.json").write_text(json.dumps(other))
    elif harm == "gone":
        shutil.rmtree(expert)
    else:
        weights = expert / "lora" / "adapter_model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-1] + b"?")
    found, error = {
        "tuned anew": ("holds another expert, expected the one", RecordingError),
        "gone": ("holds no expert, expected the one", RecordingError),
        "changed": ("was changed", InputError),
    }[harm]
    with pytest.raises(error, match=found):
        fitted(recording, tmp_path / "a", carriers=("expert",))
    assert not (tmp_path / "a").exists()
    made = fitted(recording, tmp_path / "a", carriers=("memory",)).manifest
    inputs = json.loads((recording / "recording.json").read_text())["inputs"]
    assert made.provenance.inputs["expert"] == inputs["expert"]
    assert bool(made.provenance.tune) == bool(made.metrics) == (harm == "changed")


def test_a_finished_adapter_needs_no_expert(movable: tuple[Path, Path], tmp_path: Path) -> None:
    recording, expert = movable
    made = fitted(recording, tmp_path / "a", carriers=("expert",))
    shutil.rmtree(expert)
    assert fitted(recording, tmp_path / "a", carriers=("expert",)).manifest == made.manifest


def test_a_finished_adapter_needs_no_lock(lora_recording: Path, tmp_path: Path) -> None:
    made = fitted(lora_recording, tmp_path / "a", carriers=("head",))
    # As where nothing can be written any more.
    with lock(tmp_path / "a"):
        assert fitted(lora_recording, tmp_path / "a", carriers=("head",)).manifest == made.manifest


def test_text_too_short_for_keys_is_said(lora_recording: Path, tmp_path: Path) -> None:
    (tmp_path / "short").write_text("q~")
    expert, options = lora_recording.parent / "lora", {"data": (str(tmp_path / "short"),)}
    recording = recorded(expert, out=tmp_path / "recording", **options)
    with pytest.raises(RecordingError, match=r"places to remember: 1\)") as said:
        fitted(recording, tmp_path / "a", carriers=("memory",))
    assert "more text" in said.value.hint


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
