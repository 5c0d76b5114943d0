"""Append text to an adapter's memory: one pass of the small model over it, and nothing else."""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch

from trimtab.backends.chat import chat_renderer
from trimtab.backends.hf import HFModel, ModelFingerprint
from trimtab.backends.open import one_device
from trimtab.backends.pair import open_checked
from trimtab.carriers.memory import CONTEXT_BYTES, Memory, sources_of
from trimtab.carriers.sources import travelling_names
from trimtab.config import AppendConfig, RecordConfig
from trimtab.errors import AdapterError, InputError
from trimtab.fitting.appending import Windows, new_entries
from trimtab.fitting.recorded import document_bytes
from trimtab.store.adapter import MEMORY_FILE, read_memory, write_memory
from trimtab.store.adapter_schema import AdapterManifest, Earlier, Provenance
from trimtab.store.card import CARD_NAME, write_adapter
from trimtab.store.files import lock, package_versions, replace_directory, sha256_bytes
from trimtab.store.home import trimtab_home
from trimtab.store.manifest import MANIFEST_NAME, read_manifest
from trimtab.text.corpus import drop_near_duplicates, read_documents, sha256_of_documents
from trimtab.text.passages import DocumentTokens
from trimtab.types import Document, Progress, silent

APPENDED = "appended"
"""Name of an input of an adapter: the first text that was appended; the next is `appended-2`."""

_EARLIER = 8
"""Earlier memories that a manifest names: what was computed for them serves a larger one."""


@dataclass(frozen=True)
class AppendResult:
    """What `append` made.

    Attributes:
        folder: The grown adapter.
        manifest: What it says.
        documents: Documents that were appended.
        known: Documents that the memory held already, or that were named twice.
        left_out: Documents that repeat a test file, or are no two tokens long.
        entries: Entries that were appended.
    """

    folder: Path
    manifest: AdapterManifest
    documents: int
    known: int
    left_out: int
    entries: int

    def summary(self) -> str:
        """What was appended, in up to three lines."""
        memory = self.manifest.memory
        lines = [
            f"adapter {self.folder}: {self.documents:,} documents with {self.entries:,} entries"
            f" appended; its memory has {memory.entries if memory else 0:,}"
        ]
        if self.known:
            lines.append(f"  {self.known:,} documents were in it already, or named twice")
        if self.left_out:
            lines.append(
                f"  {self.left_out:,} documents left out: they repeat a test file, or are no two"
                " tokens long"
            )
        return "\n".join(lines)


def append(config: AppendConfig, *, progress: Progress = silent) -> AppendResult:
    """Append text to an adapter's memory.

    The reference reads the new text once. Head, expert and gates stay as they are, and what was
    computed for the smaller memory (its lists, its seats on hosts) serves the larger one. Text
    that the memory holds already is passed over. An interrupted run goes on where it was.

    Args:
        config: Which adapter, which text, and where to.
        progress: Shows the pass over the text.

    Raises:
        AdapterError: The adapter is broken, or has no memory that answers with text alone.
        InputError: The text cannot be used, the output folder holds something else, or another
            run changed the adapter meanwhile.
        ModelError: The small model cannot be opened, or is not the one that made the adapter.
        NumericalError: A hidden state that is not a finite number.
        StorageError: The disk is full or the folder cannot be written.
    """
    out = config.adapter if config.out is None else config.out
    in_place = out.resolve() == config.adapter.resolve()
    if not in_place and out.resolve().is_relative_to(config.adapter.resolve()):
        raise InputError(
            f"{out} lies inside the adapter {config.adapter}, which has files of its own alone",
            hint="choose another --out",
        )
    with lock(out):
        source, manifest = config.adapter, read_manifest(config.adapter)
        _check_memory(source, manifest)
        base = _open_base(config, manifest, progress)
        file = read_memory(source, manifest)
        text = _read_text(config, base, file.memory)
        if not in_place and (out / MANIFEST_NAME).exists():
            # It holds the text; terms may be new.
            source, manifest = out, _made_before(out, manifest, text)
            file, text, in_place = read_memory(out, manifest), replace(text, new=()), True
        if in_place and not text.new and config.data_licence in (None, manifest.licences.data):
            return text.result(out, manifest, entries=0)
        with replace_directory(out) as folder:
            kept = trimtab_home() / "appending" / sha256_bytes(str(out.resolve()).encode())
            added = list[Memory]()
            if text.new:
                windows = _windows(manifest)
                added.append(new_entries(base, file.memory, text.new, windows, kept, progress))
            _check_unchanged(source, manifest)
            _copy_others(source, manifest, folder)
            write_memory(folder, file, added)
            entries = sum(map(len, added))
            whole = _grown(config, manifest, text, len(file.memory) + entries)
            written = write_adapter(folder, whole)
    shutil.rmtree(kept, ignore_errors=True)
    return text.result(out, written, entries=entries)


@dataclass(frozen=True)
class _Text:
    """What was asked to be appended, sorted.

    Attributes:
        new: Documents that the memory does not hold yet, each once, in the reference's tokens.
        sha256: Of their names, as an adapter carries them, and texts.
        known: How many it does hold, or were named twice.
        left_out: How many repeat a test file, or are no two tokens long.
    """

    new: tuple[DocumentTokens, ...]
    sha256: str
    known: int
    left_out: int

    @property
    def tokens(self) -> int:
        return sum(len(document.token_ids) for document in self.new)

    def result(self, folder: Path, manifest: AdapterManifest, *, entries: int) -> AppendResult:
        new = len(self.new) if entries else 0
        return AppendResult(folder, manifest, new, self.known, self.left_out, entries)


def _check_memory(folder: Path, manifest: AdapterManifest) -> None:
    if manifest.memory is None:
        raise AdapterError(
            f"{folder} has no memory to append to; it carries {', '.join(manifest.carriers)}",
            hint="make it anew with `trimtab fit`, memory among its --carriers",
        )
    if manifest.memory.values == "soft":
        raise AdapterError(
            f"each entry of the memory in {folder} also says what the expert thought there (soft"
            " values), which the reference cannot add",
            hint="record all text anew and fit it, or fit with --values hard and append to that",
        )


def _open_base(config: AppendConfig, manifest: AdapterManifest, progress: Progress) -> HFModel:
    base = manifest.base_model
    return open_checked(
        config.small or base.ref,
        fingerprint=ModelFingerprint(base.vocabulary_sha256, base.unembedding_sha256),
        dtype=config.dtype,
        device_map=one_device(),
        progress=progress,
    )


def _windows(manifest: AdapterManifest) -> Windows:
    """As the adapter's own text was recorded."""
    recorded, usual = manifest.provenance.record, RecordConfig.model_fields
    return Windows(
        *(
            int(str(recorded.get(name, usual[name].default)))
            for name in ("window_tokens", "stride_tokens")
        )
    )


def _read_text(config: AppendConfig, base: HFModel, memory: Memory) -> _Text:
    render = chat_renderer(base)
    asked = read_documents(config.data, render_chat=render)
    tests = read_documents(config.against, render_chat=render) if config.against else []
    found = drop_near_duplicates(asked, tests)
    repeated = {document.name for document in tests}
    left_out = sum(dropped.like in repeated for dropped in found.dropped)
    held, new = _held(memory), list[tuple[Document, DocumentTokens]]()
    for document in found.kept:
        ids = base.encode(document.text, markup=document.markup)
        content = _bytes(base, ids)
        if len(ids) < 2:
            left_out += 1
        elif content not in held:
            tokens = DocumentTokens(document.name, np.asarray(ids, dtype=np.int32))
            new.append((document, tokens))
        held.add(content)
    named = zip(travelling_names([one.name for one, _ in new]), new, strict=True) if new else ()
    texts = [replace(one, name=name) for name, (one, _) in named]
    known = len(asked) - len(new) - left_out
    return _Text(tuple(each for _, each in new), sha256_of_documents(texts), known, left_out)


def _held(memory: Memory) -> set[bytes]:
    """The documents that a memory holds."""
    raw, starts = memory.text.numpy().tobytes(), sources_of(memory).starts
    # Each is followed by a gap: before the next one, or at the end.
    return {raw[start : end - CONTEXT_BYTES] for start, end in pairwise([*starts, len(raw)])}


def _bytes(base: HFModel, token_ids: Sequence[int]) -> bytes:
    """A document as a memory holds it: what the small model's tokens stand for."""
    ids = torch.tensor(token_ids, dtype=torch.long)
    columns = {"token_ids": ids, "document_index": torch.zeros_like(ids)}
    return b"".join(document_bytes(base.vocabulary, columns))


def _made_before(out: Path, manifest: AdapterManifest, text: _Text) -> AdapterManifest:
    """What the same call has left in its folder: the memory with the text, if any is new."""
    found, memory = read_manifest(out), manifest.files[MEMORY_FILE]
    if _but_for_text(found) == _but_for_text(manifest):
        before = found.memory.grown_from[:1] if found.memory else ()
        has_grown = [earlier.sha256 for earlier in before] == [memory.sha256]
        if has_grown and text.sha256 in found.provenance.inputs.values():
            return found
        if not text.new and found.files[MEMORY_FILE] == memory:
            return found
    raise InputError(
        f"{out} holds an adapter that was made otherwise",
        hint="choose another --out, or delete that folder",
    )


def _but_for_text(manifest: AdapterManifest) -> tuple[object, ...]:
    """What appending leaves as it is."""
    own = {MEMORY_FILE, CARD_NAME}
    files = {name: entry for name, entry in manifest.files.items() if name not in own}
    carriers = dict(manifest.carriers)
    if manifest.memory:
        memory = manifest.memory.model_copy(update={"entries": 0, "grown_from": ()})
        carriers["memory"] = memory
    return manifest.base_model, carriers, manifest.blend, files


def _check_unchanged(folder: Path, manifest: AdapterManifest) -> None:
    if read_manifest(folder, verify=False) != manifest:
        raise InputError(
            f"another run has changed {folder} while its memory was to grow",
            hint="run the same command again; what it has read is kept",
        )


def _grown(
    config: AppendConfig, manifest: AdapterManifest, text: _Text, entries: int
) -> AdapterManifest:
    """What the larger adapter says of itself."""
    carrier, licences = manifest.memory, manifest.licences
    assert carrier is not None
    changed: dict[str, object] = {}
    if config.data_licence is not None:
        changed["licences"] = licences.model_copy(update={"data": config.data_licence})
    if text.new:
        smaller = Earlier(sha256=manifest.files[MEMORY_FILE].sha256, entries=carrier.entries)
        earlier = (smaller, *carrier.grown_from)[:_EARLIER]
        memory = carrier.model_copy(update={"entries": entries, "grown_from": earlier})
        changed["carriers"] = {**manifest.carriers, "memory": memory}
        changed["provenance"] = _provenance(manifest.provenance, text)
    return manifest.model_copy(update=changed)


def _provenance(provenance: Provenance, text: _Text) -> Provenance:
    times = sum(name.startswith(APPENDED) for name in provenance.inputs)
    name = f"{APPENDED}-{times + 1}" if times else APPENDED
    made = {
        "inputs": {**provenance.inputs, name: text.sha256},
        "tokens": provenance.tokens + text.tokens,
        "packages": package_versions(),
    }
    return provenance.model_copy(update=made)


def _copy_others(source: Path, manifest: AdapterManifest, folder: Path) -> None:
    """All but the memory; `write_adapter` writes the card anew."""
    for path in manifest.files:
        if path != MEMORY_FILE:
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source / path, folder / path)
