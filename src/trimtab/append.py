"""Append text to an adapter's memory: one pass of the small model over it, and nothing else."""

import shutil
from dataclasses import dataclass
from pathlib import Path

from trimtab.backends.chat import chat_renderer
from trimtab.backends.hf import HFModel, ModelFingerprint
from trimtab.backends.open import one_device
from trimtab.backends.pair import open_checked
from trimtab.carriers.memory import Memory, documents_of, joined
from trimtab.config import AppendConfig
from trimtab.errors import AdapterError, InputError
from trimtab.fitting.appending import cut_pieces, forget_pieces, read_pieces
from trimtab.store.adapter import MEMORY_FILE, MemoryFile, read_memory, write_memory
from trimtab.store.adapter_schema import AdapterManifest, Earlier
from trimtab.store.card import write_adapter
from trimtab.store.files import lock, package_versions, replace_directory
from trimtab.store.manifest import MANIFEST_NAME, read_manifest
from trimtab.text.corpus import drop_near_duplicates, read_documents, sha256_of_documents
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
        near_duplicates: Documents left out because they repeat a test file.
        entries: Entries that were appended.
    """

    folder: Path
    manifest: AdapterManifest
    documents: int
    known: int
    near_duplicates: int
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
        if self.near_duplicates:
            lines.append(f"  {self.near_duplicates:,} documents left out: they repeat a test file")
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
        InputError: The text cannot be used, or the output folder holds something else.
        ModelError: The small model cannot be opened, or is not the one that made the adapter.
        StorageError: The disk is full or the folder cannot be written.
    """
    out = config.adapter if config.out is None else config.out
    manifest = read_manifest(config.adapter)
    _check_memory(config.adapter, manifest)
    in_place = out.resolve() == config.adapter.resolve()
    with lock(out):
        base = _open_base(config, manifest, progress)
        file = read_memory(config.adapter, manifest)
        text = _read_text(config, base, file.memory)
        if not in_place and (out / MANIFEST_NAME).exists():
            return text.result(out, _made_before(out, manifest, text), entries=0)
        if in_place and not text.new:
            return text.result(out, manifest, entries=0)
        pieces = cut_pieces(base, manifest.files[MEMORY_FILE].sha256, text.new)
        larger = joined(file.memory, read_pieces(base, file.memory, text.new, pieces, progress))
        tokens = sum(piece.tokens for piece in pieces)
        with replace_directory(out) as folder:
            _copy_others(config.adapter, manifest, folder)
            write_memory(folder, MemoryFile(larger, file.probe_features))
            grown = _grown(config, manifest, text, entries=len(larger), tokens=tokens)
            written = write_adapter(folder, grown)
    forget_pieces(pieces)
    return text.result(out, written, entries=len(larger) - len(file.memory))


@dataclass(frozen=True)
class _Text:
    """What was asked to be appended, sorted.

    Attributes:
        new: Documents that the memory does not hold yet, each once.
        known: How many it does, or that were named twice.
        near_duplicates: How many repeat a test file.
    """

    new: tuple[Document, ...]
    known: int
    near_duplicates: int

    @property
    def sha256(self) -> str:
        return sha256_of_documents(self.new)

    def result(self, folder: Path, manifest: AdapterManifest, *, entries: int) -> AppendResult:
        new = len(self.new) if entries else 0
        return AppendResult(folder, manifest, new, self.known, self.near_duplicates, entries)


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


def _read_text(config: AppendConfig, base: HFModel, memory: Memory) -> _Text:
    render = chat_renderer(base)
    asked = read_documents(config.data, render_chat=render)
    tests = read_documents(config.against, render_chat=render) if config.against else []
    found = drop_near_duplicates(asked, tests)
    repeated = {document.name for document in tests}
    near = sum(dropped.like in repeated for dropped in found.dropped)
    held = set(documents_of(memory.text)[0])
    new = tuple(one for one in found.kept if one.text and _bytes(base, one) not in held)
    return _Text(new, len(asked) - len(new) - near, near)


def _bytes(base: HFModel, document: Document) -> bytes:
    """A document as a memory holds it: what the small model's tokens stand for."""
    ids = base.encode(document.text, markup=document.markup)
    joined_bytes = b"".join(base.vocabulary.token_bytes[i] or b"" for i in ids)
    return joined_bytes[int(base.vocabulary.prefix_space) :]


def _made_before(out: Path, manifest: AdapterManifest, text: _Text) -> AdapterManifest:
    found = read_manifest(out)
    before = found.memory.grown_from[:1] if found.memory else ()
    of_this = [earlier.sha256 for earlier in before] == [manifest.files[MEMORY_FILE].sha256]
    if of_this and text.sha256 in found.provenance.inputs.values():
        return found
    raise InputError(
        f"{out} holds an adapter that was made otherwise",
        hint="choose another --out, or delete that folder",
    )


def _grown(
    config: AppendConfig, manifest: AdapterManifest, text: _Text, *, entries: int, tokens: int
) -> AdapterManifest:
    """What the larger adapter says of itself."""
    carrier, provenance, licences = manifest.memory, manifest.provenance, manifest.licences
    assert carrier is not None
    smaller = Earlier(sha256=manifest.files[MEMORY_FILE].sha256, entries=carrier.entries)
    earlier = (smaller, *carrier.grown_from)[:_EARLIER]
    memory = carrier.model_copy(update={"entries": entries, "grown_from": earlier})
    times = sum(name.startswith(APPENDED) for name in provenance.inputs)
    name = f"{APPENDED}-{times + 1}" if times else APPENDED
    made = {
        "inputs": {**provenance.inputs, name: text.sha256},
        "tokens": provenance.tokens + tokens,
        "packages": package_versions(),
    }
    terms = {} if config.data_licence is None else {"data": config.data_licence}
    return manifest.model_copy(
        update={
            "carriers": {**manifest.carriers, "memory": memory},
            "provenance": provenance.model_copy(update=made),
            "licences": licences.model_copy(update=terms),
        }
    )


def _copy_others(source: Path, manifest: AdapterManifest, folder: Path) -> None:
    """All but the memory; `write_adapter` writes the card anew."""
    for path in manifest.files:
        if path != MEMORY_FILE:
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source / path, folder / path)
