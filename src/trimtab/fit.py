"""Fit an adapter's carriers to a recording: without a host, unless the head is fitted on one."""

import hashlib
import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from pydantic import JsonValue
from torch import Tensor

from trimtab.anchors import choose_anchors
from trimtab.backends.hf import HFModel
from trimtab.backends.open import LLAMACPP_SCHEME, open_model
from trimtab.carriers.gate import GATE_FEATURES
from trimtab.carriers.head import Head
from trimtab.config import CarrierName, FitConfig
from trimtab.errors import InputError, RecordingError
from trimtab.fitting.head import Checkpoint, HeadData, HeadSettings
from trimtab.fitting.host_head import fit_host_head, fit_with_progress, prepare
from trimtab.fitting.memory import fit_memory
from trimtab.fitting.recorded import (
    Columns,
    SmallLogits,
    byte_ends,
    document_bytes,
    expert_logits,
    reference_logits,
    with_states,
)
from trimtab.fitting.recorded_expert import recorded_expert, recorded_lora
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
    Blend,
    Carrier,
    ExpertCarrier,
    Gate,
    HeadCarrier,
    Licences,
    MemoryCarrier,
    Provenance,
)
from trimtab.store.card import write_adapter
from trimtab.store.expert import ExpertManifest
from trimtab.store.files import lock, package_versions, replace_directory, sha256_file
from trimtab.store.manifest import MANIFEST_NAME, read_manifest
from trimtab.store.recording import COMMON_COLUMNS, Recording
from trimtab.store.recording_schema import SPLITS
from trimtab.types import Progress, silent

_PLACES = {"model", "data", "against", "out"}
"""Settings of `tune` that name places on its user's machine, which an adapter does not tell."""

_FREE_SETTINGS = {"recording", "out", "checkpoint_every_sec"}
"""Settings of `fit` that change nothing in an adapter."""

UNFINISHED_NAME = "head.unfinished.safetensors"
"""What an unfinished fit has saved, in the adapter's folder."""

_ONCE_FIXED = {"targets": "expert"}
"""Settings that older adapters do not state, with the value that they had."""


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
        beside = f"{self.manifest.bytes_beside / 1e6:.1f} MB"
        sizes.append(f"beside them, to be mounted with: {beside}")
        return f"adapter {self.folder}\n  " + "\n  ".join(sizes)


def fit(config: FitConfig, *, progress: Progress = silent) -> FitResult:
    """Make an adapter from a recording.

    Args:
        config: What to make and how.
        progress: Shows the head's passes and the memory's look-ups.

    Raises:
        RecordingError: The recording is unfinished, changed, or of another version, or its expert
            is to be carried and is not there any more.
        ModelError: The small model cannot be opened or is not the recorded one.
        InputError: Another adapter lies in the output folder, or another run is writing there.
        NumericalError: The head's loss is not finite.
    """
    recording = Recording.open(config.recording)
    host = _open_host(config, progress)
    expert = recorded_expert(recording)
    provenance = _provenance(config, recording, expert, host)
    # Before the lock, for a finished adapter may lie where nothing can be written.
    made = _made_before(config.out, provenance)
    if made is not None:
        return FitResult(config.out, made)
    with lock(config.out):
        # Another run may have made it meanwhile.
        made = _made_before(config.out, provenance)
        if made is not None:
            return FitResult(config.out, made)
        if "expert" in config.carriers:
            # Here too, since it is copied when all else has been fitted.
            recorded_lora(recording)
        work = _Work.prepare(config, recording, provenance, progress)
        with replace_directory(config.out, unfinished=(UNFINISHED_NAME,)) as folder:
            manifest = AdapterManifest(
                name=config.name or config.out.resolve().stem or "adapter",
                base_model=recording.manifest.base,
                carriers=_write_carriers(work, host, folder, progress),
                metrics=_expert_metrics(expert),
                licences=Licences(
                    adapter=config.licence, data=config.data_licence, models=config.model_licence
                ),
                provenance=provenance,
            )
            manifest = write_adapter(folder, manifest)
    return FitResult(config.out, manifest)


def _made_before(out: Path, provenance: Provenance) -> AdapterManifest | None:
    """What the same fit has left in its folder; None if nothing lies there yet."""
    if not (out / MANIFEST_NAME).exists():
        return None
    manifest = read_manifest(out)
    settings = _ONCE_FIXED | manifest.provenance.fit
    same = settings == provenance.fit and manifest.provenance.inputs == provenance.inputs
    if not same or manifest.blend != Blend():
        raise InputError(
            f"{out} holds an adapter that was fitted with other settings or defaults",
            hint="choose another --out, or delete that folder",
        )
    return manifest


@dataclass(frozen=True)
class _Work:
    """What all carriers are made from."""

    config: FitConfig
    recording: Recording
    base: HFModel
    splits: dict[str, Columns]
    expert: SmallLogits
    checkpoint: Checkpoint

    @staticmethod
    def prepare(
        config: FitConfig, recording: Recording, provenance: Provenance, progress: Progress
    ) -> "_Work":
        base = _open_base(recording)
        # Of other text a recording may hold what the expert thinks too, which nobody asks.
        splits = {
            name: recording.read(name, None if name == "train" else COMMON_COLUMNS)
            for name in SPLITS
        }
        if config.max_tokens is not None:
            splits["train"] = _beginning(splits["train"], config.max_tokens)
        for name in ("train", "general"):
            if len(splits[name]["token_ids"]) < 2:
                raise RecordingError(
                    f"{config.recording} holds {len(splits[name]['token_ids'])} positions of"
                    f" {name} text, expected at least 2",
                    hint="record again with more text",
                )
        if "expert_numbers" in splits["train"] and _reads_expert(config):
            splits["train"] = with_states(recording, splits["train"], base.unembedding, progress)
        expert = expert_logits(recording, splits["train"], base.unembedding)
        made_from = json.dumps([provenance.fit, provenance.inputs], sort_keys=True)
        checkpoint = Checkpoint(
            config.out / UNFINISHED_NAME,
            config.checkpoint_every_sec,
            hashlib.sha256(made_from.encode()).hexdigest(),
        )
        return _Work(config, recording, base, splits, expert, checkpoint)


def _reads_expert(config: FitConfig) -> bool:
    soft = "memory" in config.carriers and config.values != "hard"
    return soft or "head" in config.carriers


def _open_host(config: FitConfig, progress: Progress) -> HFModel | None:
    if config.host is None:
        return None
    if "head" not in config.carriers:
        raise InputError(
            f"--host {config.host} is the model that the head is fitted on, but no head is made",
            hint="add head to --carriers, or leave --host out",
        )
    return open_model(config.host, dtype=config.dtype, engines=True, progress=progress)


def _beginning(columns: Columns, rows: int) -> Columns:
    """The first rows, the last of which has no next token of its document any more."""
    kept = {name: column[:rows].clone() for name, column in columns.items()}
    kept["next_ids"][-1] = -1
    return kept


def _provenance(
    config: FitConfig, recording: Recording, expert: ExpertManifest | None, host: HFModel | None
) -> Provenance:
    recorded = recording.manifest
    settings = config.model_dump(mode="json", exclude=_FREE_SETTINGS)
    inputs = {
        "recording": sha256_file(config.recording / "recording.json"),
        "expert": recorded.inputs["expert"],
    }
    if host:
        settings["host"] = _portable(host)
        inputs["host"] = host.fingerprint.unembedding_sha256
    return Provenance(
        tune=expert.config.model_dump(mode="json", exclude=_PLACES) if expert else {},
        record={k: v for k, v in recorded.config.items() if k not in {"expert", "out"}},
        fit=settings,
        packages=package_versions(),
        seed=config.seed,
        inputs=inputs,
        tokens=recorded.splits["train"].tokens,
    )


def _expert_metrics(expert: ExpertManifest | None) -> dict[str, JsonValue]:
    """What tuning did to the held-out text, as `tune` measured it."""
    if expert is None or expert.held_out is None:
        return {}
    return {"expert_held_out": expert.held_out.model_dump(mode="json")}


def _portable(host: HFModel) -> str:
    """A host's name for a file that travels: no folder of this machine."""
    scheme = LLAMACPP_SCHEME if host.has_own_logits else ""
    path = Path(host.ref.removeprefix(scheme)).expanduser()
    return scheme + path.name if path.exists() else host.ref


def _open_base(recording: Recording) -> HFModel:
    expected = recording.manifest.base
    base = open_model(expected.ref, dtype="float32", device_map="cpu")
    if base.fingerprint.vocabulary_sha256 != expected.vocabulary_sha256 or (
        base.fingerprint.unembedding_sha256 != expected.unembedding_sha256
    ):
        raise RecordingError(
            f"{expected.ref} is not the model that was recorded (its fingerprint differs)",
            hint="restore that model, or run `trimtab tune` and `trimtab record` again",
        )
    return base


def _write_carriers(
    work: _Work, host: HFModel | None, folder: Path, progress: Progress
) -> dict[CarrierName, Carrier]:
    config, base, splits = work.config, work.base, work.splits
    counts = torch.bincount(
        torch.cat([s["token_ids"] for s in splits.values()]).long(), minlength=len(base.vocabulary)
    )
    anchors = choose_anchors(base.vocabulary, base.unembedding, counts, config.anchors)
    write_mount(folder, anchors, _probe(base, splits["general"]))
    carriers: dict[CarrierName, Carrier] = {}
    if host is not None:
        write_head(folder, _fit_host_head(work, host, progress))
        carriers["head"] = HeadCarrier(
            rank=config.rank,
            hidden=host.unembedding.weight.shape[1],
            host=_portable(host),
            host_vocabulary_sha256=host.fingerprint.vocabulary_sha256,
            host_unembedding_sha256=host.fingerprint.unembedding_sha256,
        )
    elif "head" in config.carriers:
        write_head(folder, _fit_head(work, counts, progress))
        carriers["head"] = HeadCarrier(rank=config.rank, hidden=base.unembedding.weight.shape[1])
    if "memory" in config.carriers:
        carriers["memory"] = _write_memory(work, folder, progress)
    if "expert" in config.carriers:
        carriers["expert"] = _copy_expert(work.recording, folder)
    return carriers


def _write_memory(work: _Work, folder: Path, progress: Progress) -> MemoryCarrier:
    base = work.base
    head = work.recording.expert_unembedding() or base.unembedding
    names = [document.name for document in work.recording.documents("train")]
    memory = fit_memory(work.config, base, head, work.splits, names, progress)
    states = work.splits["general"]["reference_hidden"].float()
    write_memory(folder, MemoryFile(memory, memory.features(states)))
    return MemoryCarrier(
        entries=len(memory),
        key_size=memory.keys.shape[1],
        values=work.config.values,
        gate=Gate(features=GATE_FEATURES, weights=memory.gate),
        own_gate=Gate(features=GATE_FEATURES, weights=memory.own_gate),
        bytes_gate=Gate(features=GATE_FEATURES, weights=memory.bytes_gate),
    )


def _probe(base: HFModel, general: Columns) -> Probe:
    states = general["reference_hidden"].float()
    return Probe(
        tuple(document_bytes(base.vocabulary, general)),
        general["document_index"].to(torch.int32),
        byte_ends(base.vocabulary, general).to(torch.int32),
        states.mean(0),
        states.std(0),
    )


def _fit_head(work: _Work, counts: Tensor, progress: Progress) -> HeadFile:
    """Fit the head on the reference's states."""
    config, base, splits = work.config, work.base, work.splits
    active = torch.argsort(counts, descending=True, stable=True)[: config.active_tokens]
    rows = base.unembedding.weight[active].detach().float() * base.unembedding.scale
    hidden = torch.cat([splits[s]["reference_hidden"] for s in ("train", "general")])
    domain = len(splits["train"]["token_ids"])
    weight = torch.ones(len(hidden))
    weight[domain:] = config.general_weight

    def logits(batch: Tensor, compared: Tensor) -> tuple[Tensor, Tensor]:
        chosen, followed = active[compared], batch < domain
        own = base.unembedding.logits(hidden[batch].float(), chosen)
        target = own.clone()
        target[followed] = work.expert(batch[followed], chosen)
        return own, target

    settings = HeadSettings(config.rank, config.epochs, config.learning_rate, config.seed)
    general = splits["general"]["reference_hidden"].float()
    data = HeadData(hidden, logits, weight)
    moments = (general.mean(0), general.std(0))
    head = fit_with_progress(data, rows, moments, settings, work.checkpoint, progress)
    return _head_file(head, base, general)


def _fit_host_head(work: _Work, host: HFModel, progress: Progress) -> HeadFile:
    """Fit the head on the host's states; its rows are the host's own, which the host has."""
    prepared = prepare(host, work.base, work.splits, progress)
    reference = reference_logits(work.splits["train"], work.base.unembedding)
    head = fit_host_head(work.config, prepared, work.expert, reference, work.checkpoint, progress)
    return HeadFile(
        head, (), torch.zeros(0, work.config.rank + 1), torch.zeros(0, work.config.rank)
    )


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


def _copy_expert(recording: Recording, folder: Path) -> ExpertCarrier:
    source, target = recorded_lora(recording), folder / EXPERT_FOLDER
    target.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copyfile(source / name, target / name)
    rank = json.loads((target / "adapter_config.json").read_text())["r"]
    return ExpertCarrier(rank=rank)
