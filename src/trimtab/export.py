"""Export a mounted head for engines that run without Trimtab."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from trimtab.backends.hf import HFModel
from trimtab.backends.open import check_in_torch, open_model
from trimtab.config import ExportConfig, MountConfig
from trimtab.errors import AdapterError, InputError
from trimtab.exporting.engines import check_host
from trimtab.exporting.measured import Measured, split_states
from trimtab.exporting.readme import README_NAME, ExportRecord, render_readme, words
from trimtab.exporting.writers import Job, Written, write
from trimtab.mount import mount
from trimtab.steering.host_states import HostStates, host_states, kept_host_states
from trimtab.steering.mounted import Mounted
from trimtab.store.adapter import HEAD_FILE
from trimtab.store.adapter_schema import MANIFEST_NAME, AdapterManifest
from trimtab.store.files import (
    lock,
    names_in,
    package_versions,
    replace_directory,
    sha256_file,
    write_atomic,
    write_json,
)
from trimtab.store.manifest import read_manifest
from trimtab.types import Progress, silent

RECORD_NAME = "export.json"
"""What an export was made from and what was measured, for programs."""


@dataclass(frozen=True)
class ExportResult:
    """An export on disk.

    Attributes:
        folder: Where it lies.
        record: What its export.json says.
        measured: How far it is from the mounted head, and how much there was to get wrong.
        warnings: What the mount had to say about the fit.
    """

    folder: Path
    record: ExportRecord
    measured: Measured
    warnings: tuple[str, ...]

    def summary(self) -> str:
        """Where it lies, how exact it is, and what is approximated, refused or left out."""
        record, measured = self.record, self.measured
        lines = [
            f"{self.folder}: {record.adapter} on {record.host} as {record.to},"
            f" strength {record.strength:g}; {README_NAME} says how to load it",
            f"against the mounted head: {words(measured.export)}",
            f"  (the head itself moves the host by {words(measured.head)})",
            *(f"warning: {warning}" for warning in self.warnings),
            *(f"note: {note}" for note in record.notes),
            *(f"left out: {part}" for part in record.left_out),
        ]
        return "\n".join(lines)


def export(
    config: ExportConfig, *, host: HFModel | None = None, progress: Progress = silent
) -> ExportResult:
    """Export a mounted head for engines that run without Trimtab.

    The head alone is exported: a memory needs a search, the expert a second model. The folder
    appears whole or not at all, and never in the place of another one.

    Args:
        config: Which adapter, which host, which form, and where to.
        host: The host, if it is open already; it is left as it was.
        progress: Shows the opening, the mounting and the writing.

    Returns:
        What was written, and how exact it is; `summary()` says it in words.

    Raises:
        InputError: There is something at `out` already, or another run is writing it.
        AdapterError: The adapter is broken, has no head, or its head does not fit this host.
        ModelError: The host cannot be opened, or the form cannot express the head on it.
        MissingDependencyError: The form needs a package that is not installed.
        StorageError: The disk is full or the folder cannot be written.
    """
    with _sole_writer(config.out):
        manifest = read_manifest(config.adapter, read_again=True)
        _check_head(manifest)
        host = host or open_model(
            config.host, dtype=config.dtype, device_map="cpu", progress=progress
        )
        check_in_torch(host, "trimtab export")
        check_host(host, config.to)
        mounted = mount(_head_alone(config), host=host, progress=progress)
        assert mounted.head is not None
        states = split_states(_states(host, mounted, progress))
        job = Job(config, host, mounted.head, states, manifest.blend)
        record, measured = _write(job, manifest, progress)
    return ExportResult(config.out, record, measured, mounted.warnings)


def _write(
    job: Job, manifest: AdapterManifest, progress: Progress
) -> tuple[ExportRecord, Measured]:
    """Make the folder; what it says of itself, and how exact it is."""
    config = job.config
    with replace_directory(config.out, marker=RECORD_NAME) as folder:
        with progress(f"writing {config.to}", 1) as advance:
            written = write(job, folder)
            advance(1)
        record = _record(config, manifest, job.host, written, folder)
        write_json(folder / RECORD_NAME, record.model_dump(mode="json"))
        write_atomic(folder / README_NAME, render_readme(record, written.usage).encode())
    return record, written.measured


def _head_alone(config: ExportConfig) -> MountConfig:
    return MountConfig(
        adapter=config.adapter, host=config.host, carriers=("head",), dtype=config.dtype
    )


@contextmanager
def _sole_writer(out: Path) -> Iterator[None]:
    """Be the only run that writes the folder, which must be new or empty."""
    _check_out(out)
    with lock(out):
        # Another export may have ended between the two.
        _check_out(out)
        yield


def _check_out(out: Path) -> None:
    if out.is_file() or names_in(out):
        raise InputError(
            f"there is something at {out} already, and an export overwrites nothing",
            hint="choose a new --out, or remove it first",
        )


def _check_head(manifest: AdapterManifest) -> None:
    if manifest.head is None:
        raise AdapterError(
            f"the adapter {manifest.name} carries {', '.join(manifest.carriers)}, and only a head"
            " can be exported: a memory needs a search and the expert a second model",
            hint="run `trimtab fit` with --carriers head, or use `trimtab generate`",
        )


def _states(host: HFModel, mounted: Mounted, progress: Progress) -> HostStates:
    # A preamble moves the host's states, and has no say in a kept file's name.
    keeps = host.source is not None and not host.preamble
    read = kept_host_states if keeps else host_states
    return read(host, mounted.probe_documents, "reading the probe text", progress)


def _record(
    config: ExportConfig,
    manifest: AdapterManifest,
    host: HFModel,
    written: Written,
    folder: Path,
) -> ExportRecord:
    measured = written.measured
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return ExportRecord(
        to=config.to,
        adapter=manifest.name,
        adapter_sha256=sha256_file(config.adapter / MANIFEST_NAME),
        head_sha256=manifest.files[HEAD_FILE].sha256,
        host=host.ref,
        host_vocabulary_sha256=host.fingerprint.vocabulary_sha256,
        host_unembedding_sha256=host.fingerprint.unembedding_sha256,
        strength=config.strength,
        settings=written.settings,
        fidelity=asdict(measured.export),
        head_size=asdict(measured.head),
        offset_size=asdict(measured.offset),
        notes=written.notes,
        left_out=_left_out(manifest),
        licences=manifest.licences,
        packages=package_versions(),
        files={path.relative_to(folder).as_posix(): sha256_file(path) for path in files},
    )


def _left_out(manifest: AdapterManifest) -> tuple[str, ...]:
    found = [
        "evidence weights: `trimtab generate` weighs the head against the bare host by how well"
        " each predicts the text so far; this export follows the head at every token"
    ]
    if manifest.memory is not None:
        found.append("the memory and its gate: they need a search of the training text")
    if manifest.expert is not None:
        found.append("the expert and its live blends: they need the small models beside the host")
    return tuple(found)
