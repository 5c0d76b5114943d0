"""Fit an adapter's carriers to a recording: no host, and for the head no text."""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from trimtab.anchors import choose_anchors
from trimtab.backends.hf import HFModel
from trimtab.backends.open import open_model
from trimtab.carriers.head import Head, HeadData, HeadSettings, fit_head
from trimtab.carriers.memory import (
    GATE_FEATURES,
    Memory,
    build_index,
    contexts_before,
    fit_gate,
    gate_features,
    lay_out,
    look_up,
    whitening,
)
from trimtab.config import FitConfig
from trimtab.encoding import Samples, TopK, decode_samples, decode_topk
from trimtab.errors import InputError, RecordingError
from trimtab.store.adapter import (
    EXPERT_FOLDER,
    HeadFile,
    MemoryFile,
    Probe,
    write_head,
    write_memory,
    write_mount,
)
from trimtab.store.adapter_schema import (
    AdapterManifest,
    Carrier,
    ExpertCarrier,
    Gate,
    HeadCarrier,
    MemoryCarrier,
    Provenance,
)
from trimtab.store.card import write_adapter
from trimtab.store.files import lock, package_versions, replace_directory, sha256_file
from trimtab.store.manifest import MANIFEST_NAME, read_manifest
from trimtab.store.recording import Recording
from trimtab.types import Progress, silent

Columns = dict[str, Tensor]
SOFT_VALUES = 8
"""Expert's tokens kept per entry of a soft memory."""


@dataclass(frozen=True)
class FitResult:
    """What `fit` made."""

    folder: Path
    manifest: AdapterManifest

    def summary(self) -> str:
        """One line a carrier."""
        sizes = [
            f"{name}: {self.manifest.bytes_of(name) / 1e6:.1f} MB"
            for name in self.manifest.carriers
        ]
        return f"adapter {self.folder}\n  " + "\n  ".join(sizes)


def fit(config: FitConfig, *, progress: Progress = silent) -> FitResult:
    """Make an adapter from a recording.

    Args:
        config: What to make and how.
        progress: Shows the head's passes and the memory's look-ups.

    Raises:
        RecordingError: The recording is unfinished, changed, or of another version.
        ModelError: The small model cannot be opened or is not the recorded one.
        InputError: Another adapter lies in the output folder.
        NumericalError: The head's loss is not finite.
    """
    recording = Recording.open(config.recording)
    provenance = _provenance(config, recording)
    if (config.out / MANIFEST_NAME).exists():
        manifest = read_manifest(config.out)
        if manifest.provenance.fit == provenance.fit and (
            manifest.provenance.inputs == provenance.inputs
        ):
            return FitResult(config.out, manifest)
        raise InputError(
            f"{config.out} holds an adapter that was fitted with other settings",
            hint="choose another --out, or delete that folder",
        )
    base = _open_base(recording)
    splits = {name: recording.read(name) for name in ("train", "held_out", "general")}
    if config.max_tokens is not None:
        splits["train"] = _beginning(splits["train"], config.max_tokens)
    with lock(config.out), replace_directory(config.out) as folder:
        carriers = _write_carriers(config, recording, base, splits, folder, progress)
        manifest = AdapterManifest(
            name=config.name,
            base_model=recording.manifest.base,
            carriers=carriers,
            provenance=provenance,
        )
        manifest = write_adapter(folder, manifest)
    return FitResult(config.out, manifest)


def _beginning(columns: Columns, rows: int) -> Columns:
    """The first rows, the last of which has no next token of its document any more."""
    kept = {name: column[:rows].clone() for name, column in columns.items()}
    kept["next_ids"][-1] = -1
    return kept


def _provenance(config: FitConfig, recording: Recording) -> Provenance:
    recorded = recording.manifest
    settings = config.model_dump(mode="json", exclude={"recording", "out"})
    source = Path(str(recorded.config["expert"])) / "expert.json"
    return Provenance(
        tune={},
        record={k: v for k, v in recorded.config.items() if k not in {"expert", "out"}},
        fit=settings,
        packages=package_versions(),
        seed=config.seed,
        inputs={
            "recording": sha256_file(config.recording / "recording.json"),
            **({"expert": sha256_file(source)} if source.exists() else {}),
        },
        tokens=recorded.splits["train"].tokens,
    )


def _open_base(recording: Recording) -> HFModel:
    expected = recording.manifest.base
    base = open_model(expected.ref, dtype="float32")
    if base.fingerprint.vocabulary_sha256 != expected.vocabulary_sha256 or (
        base.fingerprint.unembedding_sha256 != expected.unembedding_sha256
    ):
        raise RecordingError(
            f"{expected.ref} is not the model that was recorded (its fingerprint differs)",
            hint="restore that model, or run `trimtab tune` and `trimtab record` again",
        )
    return base


def _write_carriers(
    config: FitConfig,
    recording: Recording,
    base: HFModel,
    splits: dict[str, Columns],
    folder: Path,
    progress: Progress,
) -> dict[str, Carrier]:
    general = splits["general"]
    probe = _probe(base, general)
    counts = torch.bincount(
        torch.cat([s["token_ids"] for s in splits.values()]).long(), minlength=len(base.vocabulary)
    )
    anchors = choose_anchors(base.vocabulary, base.unembedding, counts, config.anchors)
    write_mount(folder, anchors, probe)
    states = general["reference_hidden"].float()
    carriers: dict[str, Carrier] = {}
    if "head" in config.carriers:
        head = _fit_head(config, recording, base, splits, counts, progress)
        write_head(folder, _head_file(head, base, states))
        carriers["head"] = HeadCarrier(rank=config.rank, hidden=len(head.mean))
    if "memory" in config.carriers:
        memory = _fit_memory(config, base, splits, progress)
        write_memory(folder, MemoryFile(memory, memory.features(states)))
        carriers["memory"] = MemoryCarrier(
            entries=len(memory),
            key_size=memory.keys.shape[1],
            values=config.values,
            gate=Gate(features=GATE_FEATURES, weights=memory.gate),
        )
    if "expert" in config.carriers:
        carriers["expert"] = _copy_expert(recording, folder)
    return carriers


def _probe(base: HFModel, general: Columns) -> Probe:
    documents = _document_bytes(base, general)
    states = general["reference_hidden"].float()
    return Probe(
        tuple(documents),
        general["document_index"].to(torch.int32),
        _byte_ends(base, general).to(torch.int32),
        states.mean(0),
        states.std(0),
    )


def _token_lengths(base: HFModel) -> Tensor:
    return torch.tensor([len(text or b"") for text in base.vocabulary.token_bytes])


def _document_bytes(base: HFModel, columns: Columns) -> list[bytes]:
    """The recorded documents, put together again from their tokens."""
    token_bytes = base.vocabulary.token_bytes
    documents: dict[int, list[bytes]] = {}
    rows = zip(columns["document_index"].tolist(), columns["token_ids"].tolist(), strict=True)
    for document, token_id in rows:
        documents.setdefault(document, []).append(token_bytes[token_id] or b"")
    return [b"".join(parts) for parts in documents.values()]


def _byte_ends(base: HFModel, columns: Columns) -> Tensor:
    """Bytes of its document read at each position, the position's own token included."""
    ends = _token_lengths(base)[columns["token_ids"].long()].cumsum(0)
    document = columns["document_index"].long()
    _, sizes = torch.unique_consecutive(document, return_counts=True)
    starts = torch.cat([torch.zeros(1, dtype=torch.long), ends[sizes.cumsum(0)[:-1] - 1]])
    return ends - starts.repeat_interleave(sizes)


def _fit_head(
    config: FitConfig,
    recording: Recording,
    base: HFModel,
    splits: dict[str, Columns],
    counts: Tensor,
    progress: Progress,
) -> Head:
    active = torch.argsort(counts, descending=True, stable=True)[: config.active_tokens]
    rows = base.unembedding.weight[active].detach().float() * base.unembedding.scale
    hidden = torch.cat([splits[s]["reference_hidden"] for s in ("train", "general")])
    domain = len(splits["train"]["token_ids"])
    target = _targets(recording, base, splits, active)
    total = len(hidden)
    weight = torch.ones(total)
    weight[domain:] = config.general_weight

    def base_logits(batch: Tensor) -> Tensor:
        return base.unembedding.logits(hidden[batch].float(), active)

    def target_logits(batch: Tensor) -> Tensor:
        logits = base_logits(batch)
        followed = batch < domain
        logits[followed] = target(batch[followed])
        return logits

    settings = HeadSettings(config.rank, config.epochs, config.learning_rate, config.seed)
    general = splits["general"]["reference_hidden"].float()
    data = HeadData(hidden, base_logits, target_logits, weight)
    with progress("fitting the head", config.epochs * total) as advance:
        return fit_head(data, rows, general.mean(0), general.std(0), settings, on_batch=advance)


def _targets(
    recording: Recording, base: HFModel, splits: dict[str, Columns], active: Tensor
) -> Callable[[Tensor], Tensor]:
    """From train positions to the expert's logits (or log-probabilities) over active tokens."""
    train, vocab = splits["train"], recording.manifest.vocab
    if "expert_hidden" in train:
        unembedding = recording.expert_unembedding() or base.unembedding
        return lambda batch: unembedding.logits(train["expert_hidden"][batch].float(), active)
    if "expert_top_ids" in train:
        names = ("top_ids", "top_logprobs", "log_tail", "log_normaliser")
        parts = [train[f"expert_{name}"] for name in names]
        return lambda batch: decode_topk(TopK(*(p[batch] for p in parts)), vocab)[:, active]
    ids, drawn = train["expert_sample_ids"], train["expert_sample_counts"]
    floor = 1e-9
    return lambda batch: (
        decode_samples(Samples(ids[batch], drawn[batch]), vocab)[:, active] + floor
    ).log()


def _head_file(head: Head, base: HFModel, general_states: Tensor) -> HeadFile:
    ids = list(base.vocabulary.ids_by_bytes.values())
    rows = base.unembedding.weight[ids].detach().float() * base.unembedding.scale
    shifts = rows @ torch.cat([head.up, head.offset[:, None]], 1)
    return HeadFile(
        head,
        tuple(base.vocabulary.ids_by_bytes),
        shifts,
        (general_states - head.mean) @ head.down.T,
    )


def _fit_memory(
    config: FitConfig, base: HFModel, splits: dict[str, Columns], progress: Progress
) -> Memory:
    train = splits["train"]
    states = train["reference_hidden"].float()
    answered = train["next_ids"] >= 0
    projection, mean = whitening(states[answered], config.key_size)
    text, starts = lay_out(_document_bytes(base, train))
    positions = torch.tensor(starts)[train["document_index"].long()] + _byte_ends(base, train)
    keys = (states[answered] - mean) @ projection.T
    soft = _soft_values(config, base, train, answered)
    memory = Memory(
        torch.nn.functional.normalize(keys, dim=-1).half(),
        projection,
        mean,
        text,
        positions[answered],
        (),
        *soft,
    )
    gate = _fit_gate(base, memory, train["next_ids"][answered].long(), splits, progress)
    return replace(memory, gate=gate)


@torch.no_grad()
def _soft_values(
    config: FitConfig, base: HFModel, train: Columns, answered: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    if config.values == "hard":
        return None, None
    if "expert_top_ids" in train:
        ids = train["expert_top_ids"][answered][:, :SOFT_VALUES]
        return ids, train["expert_top_logprobs"][answered][:, :SOFT_VALUES].exp()
    if "expert_hidden" not in train:
        raise InputError(
            "soft values need an exact or a sparse recording, and this one is sampled",
            hint="record again with --encoding exact or sparse, or fit with --values hard",
        )
    ids, probs = [], []
    for states in train["expert_hidden"][answered].split(512):
        top = base.unembedding.logits(states.float()).softmax(-1).topk(SOFT_VALUES)
        ids.append(top.indices.to(torch.int32))
        probs.append(top.values)
    return torch.cat(ids), torch.cat(probs)


@torch.no_grad()
def _fit_gate(
    base: HFModel,
    memory: Memory,
    next_tokens: Tensor,
    splits: dict[str, Columns],
    progress: Progress,
) -> tuple[float, ...]:
    """Learn the gate on held-out domain text and general text, each with half the weight."""
    index = build_index(memory)
    features, logprob, memory_logprob, weight = [], [], [], []
    total = sum(len(splits[s]["token_ids"]) for s in ("held_out", "general"))
    with progress("fitting the memory's gate", total) as advance:
        for split in ("held_out", "general"):
            columns = splits[split]
            text, starts = lay_out(_document_bytes(base, columns))
            first = torch.tensor(starts)[columns["document_index"].long()]
            contexts = contexts_before(text, first + _byte_ends(base, columns))
            answered = torch.nonzero(columns["next_ids"] >= 0)[:, 0]
            for rows in answered.split(256):
                state = columns["reference_hidden"][rows].float()
                found = look_up(memory, index, memory.features(state), contexts[rows])
                values = next_tokens[found.entries]
                logprobs = base.unembedding.logits(state).log_softmax(-1)
                truth = columns["next_ids"][rows].long()
                right = found.weights * (values == truth[:, None])
                features.append(gate_features(found, values, logprobs))
                logprob.append(logprobs.gather(1, truth[:, None])[:, 0])
                memory_logprob.append(right.sum(1).log())
                weight.append(torch.full((len(rows),), 0.5 / len(answered)))
                advance(len(rows))
    if not features:
        raise RecordingError(
            "the recording holds no held-out and no general text to learn a gate from",
            hint="tune with --held-out above 0 and record again",
        )
    with torch.enable_grad():
        return fit_gate(
            torch.cat(features), torch.cat(logprob), torch.cat(memory_logprob), torch.cat(weight)
        )


def _copy_expert(recording: Recording, folder: Path) -> ExpertCarrier:
    source = Path(str(recording.manifest.config["expert"])) / "lora"
    if not source.is_dir():
        raise InputError(
            f"{source} is not there, and the expert carrier is a copy of it",
            hint="restore the expert's folder, tune with --method lora, or leave expert out of"
            " --carriers",
        )
    target = folder / EXPERT_FOLDER
    target.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copyfile(source / name, target / name)
    rank = json.loads((target / "adapter_config.json").read_text())["r"]
    return ExpertCarrier(rank=rank)
