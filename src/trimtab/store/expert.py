"""The words of an expert's folder: expert.json when finished, checkpoint/run.json until then."""

import math
import shutil
from pathlib import Path
from typing import Literal, TypeVar

from pydantic import Field, FiniteFloat, ValidationError

from trimtab.config import TuneConfig, TuneMethod
from trimtab.errors import InputError
from trimtab.store.adapter_schema import BaseModelReference, FileEntry, Part, Sha256
from trimtab.store.files import read_json, sha256_file, write_json

FORMAT = "trimtab-expert"
VERSION = 1
EXPERT_NAME = "expert.json"
TRAIN_NAME = "train.jsonl"
HELD_OUT_NAME = "held_out.jsonl"
LORA_NAME = "lora"
MODEL_NAME = "model"
CHECKPOINT_NAME = "checkpoint"
RUN_NAME = f"{CHECKPOINT_NAME}/run.json"
STATE_NAME = f"{CHECKPOINT_NAME}/state.safetensors"

_FREE_SETTINGS = {"out", "checkpoint_every_sec", "data", "against"}
_AGAIN = "tune the expert again into a new folder"


class Documents(Part):
    """What became of the input documents."""

    train: int = Field(ge=1)
    """Documents trained on."""
    held_out: int = Field(ge=0)
    """Documents kept for validation."""
    near_duplicates: int = Field(ge=0)
    """Documents removed because a test file is nearly the same."""


class HeldOut(Part):
    """What the held-out text costs before and after training."""

    tokens: int = Field(ge=1)
    """Tokens that a validation scores."""
    bytes: int = Field(ge=1)
    """Bytes of those tokens."""
    nats_per_token: tuple[FiniteFloat, ...] = Field(min_length=1)
    """Each validation's loss; the first is the base's, before training."""
    nats_per_token_before: FiniteFloat
    """Loss of the base."""
    nats_per_token_after: FiniteFloat
    """Loss of the expert: the lowest of all."""
    bits_per_byte_before: FiniteFloat
    """The base's loss in the unit that does not depend on the tokenizer."""
    bits_per_byte_after: FiniteFloat
    """The expert's."""

    @property
    def has_gained(self) -> bool:
        """Whether training helped; where it did not, the expert is the base itself."""
        return self.nats_per_token_after < self.nats_per_token_before


class Trial(Part):
    """A short training at one learning rate, to choose among several."""

    learning_rate: float = Field(gt=0)
    """Peak of its schedule."""
    tokens: int = Field(ge=0)
    """Tokens that its loss counted."""
    nats_per_token: FiniteFloat | None
    """What the held-out text costs after it; none where its loss was no finite number."""

    def cost(self) -> float:
        """What the held-out text costs, nats per token; infinitely much where it failed."""
        return math.inf if self.nats_per_token is None else self.nats_per_token


class UnfinishedRun(Part):
    """What a run of tune must find again to continue: checkpoint/run.json."""

    format: Literal["trimtab-expert-run"] = "trimtab-expert-run"
    """Names the format."""
    version: Literal[1] = VERSION
    """Version of the format."""
    config: TuneConfig
    """Resolved configuration."""
    inputs: dict[str, Sha256]
    """Fingerprints of the documents in `data` and `against`."""
    documents: Documents | None = None
    """Counts, once the documents lie in train.jsonl and held_out.jsonl."""
    trials: tuple[Trial, ...] = ()
    """Learning rates that have been tried."""


class ExpertManifest(Part):
    """Everything that expert.json says."""

    format: Literal["trimtab-expert"] = FORMAT
    """Names the format."""
    version: Literal[1] = VERSION
    """Version of the format."""
    contains_text: Literal[True] = True
    """The folder holds the training and held-out text itself (train.jsonl, held_out.jsonl)."""
    base: BaseModelReference
    """The small model before tuning: the reference."""
    method: TuneMethod
    """lora, qlora: PEFT files in lora/; full: a transformers folder model/."""
    config: TuneConfig
    """Resolved configuration."""
    seed: int
    """Seed of everything random."""
    packages: dict[str, str]
    """Versions of the packages that computed it."""
    inputs: dict[str, Sha256]
    """Fingerprints of the documents in `data` and `against`."""
    documents: Documents
    """What became of the input documents."""
    steps: int = Field(ge=1)
    """Optimiser steps taken."""
    train_tokens: int = Field(ge=1)
    """Tokens that the loss counted, over all steps."""
    held_out: HeldOut | None = None
    """What the held-out text costs; none if no text was held out."""
    learning_rate: float | None = Field(default=None, gt=0)
    """Peak of the schedule that it learnt by; none in records older than trials."""
    trials: tuple[Trial, ...] = ()
    """Learning rates that were tried before, where none was given."""
    files: dict[str, FileEntry]
    """Every other file by its path inside the folder."""

    @property
    def all_train_tokens(self) -> int:
        """Tokens that losses counted, trials included: what the training has cost."""
        return self.train_tokens + sum(trial.tokens for trial in self.trials)


_Manifest = TypeVar("_Manifest", ExpertManifest, UnfinishedRun)


def write_expert(folder: Path, manifest: ExpertManifest) -> None:
    """Write expert.json, which marks the folder as finished.

    Raises:
        StorageError: The folder cannot be written.
    """
    write_json(folder / EXPERT_NAME, manifest.model_dump(mode="json"))


def read_expert(folder: Path, *, verify: bool = True) -> ExpertManifest:
    """Read expert.json.

    Args:
        folder: Folder that `tune` wrote.
        verify: Also compare every file with its sha256.

    Raises:
        InputError: No finished expert, another format version, an unknown key, or a file that
            is missing or changed.
    """
    if not (folder / EXPERT_NAME).is_file():
        unfinished = (folder / RUN_NAME).is_file()
        raise InputError(
            f"{folder} holds {'an unfinished' if unfinished else 'no'} expert: it has no"
            f" {EXPERT_NAME}",
            hint="run the same `trimtab tune` command again to finish it"
            if unfinished
            else "give the folder that `trimtab tune` wrote",
        )
    manifest = _read(folder / EXPERT_NAME, ExpertManifest)
    if verify:
        _verify(folder, manifest)
    return manifest


def write_run(folder: Path, run: UnfinishedRun) -> None:
    """Write checkpoint/run.json.

    Raises:
        StorageError: The folder cannot be written.
    """
    write_json(folder / RUN_NAME, run.model_dump(mode="json"))


def withdraw_run(folder: Path) -> None:
    """Remove what a run that was refused before its first step has written."""
    for name in (TRAIN_NAME, HELD_OUT_NAME):
        (folder / name).unlink(missing_ok=True)
    shutil.rmtree(folder / CHECKPOINT_NAME, ignore_errors=True)


def read_run(folder: Path) -> UnfinishedRun | None:
    """Read checkpoint/run.json; None if no run began in this folder.

    Raises:
        InputError: Another format version, an unknown key, or broken JSON.
    """
    return _read(folder / RUN_NAME, UnfinishedRun) if (folder / RUN_NAME).exists() else None


def has_trained(folder: Path, run: UnfinishedRun) -> bool:
    """Whether an unfinished run has come to a checkpoint, of a trial or of the training itself."""
    return bool(run.trials) or any((folder / CHECKPOINT_NAME).glob("*.safetensors"))


def check_same_run(
    folder: Path, found: ExpertManifest | UnfinishedRun, asked: UnfinishedRun
) -> None:
    """Refuse to continue or reuse a folder that was made with other settings or other text.

    Where folder and text lie and how often it is saved may differ, since none changes a result.

    Raises:
        InputError: A setting or the input text differs.
    """
    was, wanted = found.config.model_dump(mode="json"), asked.config.model_dump(mode="json")
    changed = [key for key in wanted if key not in _FREE_SETTINGS and was[key] != wanted[key]]
    hint = "choose another --out, or give the settings and the text of the first run"
    if changed:
        parts = (f"{key} is {wanted[key]!r}, was {was[key]!r}" for key in changed)
        raise InputError(f"{folder} was begun with other settings: {'; '.join(parts)}", hint=hint)
    names = sorted({*asked.inputs, *found.inputs})
    others = [name for name in names if asked.inputs.get(name) != found.inputs.get(name)]
    if others:
        raise InputError(
            f"the text in {' and '.join(others)} is not the text that {folder} was begun with",
            hint=hint,
        )


def file_entries(folder: Path) -> dict[str, FileEntry]:
    """Fingerprint every file of an expert's folder that expert.json must list."""
    paths = [folder / TRAIN_NAME, folder / HELD_OUT_NAME]
    for name in (LORA_NAME, MODEL_NAME):
        paths += sorted(path for path in (folder / name).rglob("*") if path.is_file())
    return {
        path.relative_to(folder).as_posix(): FileEntry(
            sha256=sha256_file(path), bytes=path.stat().st_size
        )
        for path in paths
        if path.is_file()
    }


def _verify(folder: Path, manifest: ExpertManifest) -> None:
    found = file_entries(folder)
    for path, entry in manifest.files.items():
        if path not in found:
            raise InputError(f"the expert {folder} lacks {path}", hint=_AGAIN)
        if found[path] != entry:
            raise InputError(
                f"{folder / path} was changed: sha256 is {found[path].sha256}, expected"
                f" {entry.sha256}",
                hint=_AGAIN,
            )


def _read(path: Path, schema: type[_Manifest]) -> _Manifest:
    value = read_json(path, "record of an expert")
    version = value.get("version")
    if isinstance(version, int) and version > VERSION:
        raise InputError(
            f"{path} is of format version {version}, this trimtab reads up to {VERSION}",
            hint="upgrade trimtab",
        )
    try:
        return schema.model_validate(value)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        found = "unknown key" if first["type"] == "extra_forbidden" else first["msg"]
        raise InputError(f"{path} is not valid: {where}: {found}", hint=_AGAIN) from error
