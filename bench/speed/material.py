"""What the bench works on: texts, a real expert, its recording and adapters, made once and kept."""

import json
import shutil
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

import trimtab
from bench.speed.rows import Pair, Settings
from bench.speed.shapes import SCHEME, random_folder
from bench.speed.text import chosen, endless
from bench.transfer.pairs import model_ref
from examples.demo import corpus
from trimtab import FitConfig, RecordConfig, TuneConfig
from trimtab.align.strings import token_lengths
from trimtab.backends.hf import HFModel
from trimtab.carriers.memory import Memory, lay_out
from trimtab.carriers.sources import Sources
from trimtab.progress import Display
from trimtab.store.adapter import (
    HEAD_FILE,
    MOUNT_FILE,
    MemoryFile,
    read_memory,
    write_memory,
)
from trimtab.store.adapter_schema import MANIFEST_NAME
from trimtab.store.card import write_adapter
from trimtab.store.files import replace_directory, sha256_file, write_json
from trimtab.store.manifest import read_manifest
from trimtab.store.recording import Recording, file_entry, shard_entry, write_shard
from trimtab.store.recording_schema import DOCUMENTS_NAME, SplitEntry, shard_name
from trimtab.store.recording_schema import MANIFEST_NAME as RECORDING_NAME

KEY_NOISE = 0.5
"""Length of what is added to a key, whose own length is one, before it is repeated."""

SHARD_ROWS = 8_192


@dataclass(frozen=True)
class Material:
    """Files of one pair, in a folder of their own; what is there already is not made again.

    Attributes:
        pair: The models.
        settings: Sizes.
        folder: The folder.
        display: Shows the making.
    """

    pair: Pair
    settings: Settings
    folder: Path
    display: Display

    @cached_property
    def small_ref(self) -> str:
        """What `open_model` takes for the small model."""
        return self._ref(self.pair.small, "small")

    @cached_property
    def host_ref(self) -> str:
        """What `open_model` takes for the host."""
        return model_ref(self.pair.host)

    def _ref(self, name: str, kind: str) -> str:
        pair = self.pair
        if not pair.is_random:
            return model_ref(name)
        assert pair.tokenizer is not None
        shape = name.removeprefix(SCHEME)
        return str(random_folder(shape, pair.tokenizer, self.folder / kind))

    @cached_property
    def train_text(self) -> Path:
        """Folder of the text that the expert learns."""
        folder = self.folder / "text"
        corpus.write_texts(folder, chosen(self.pair.text)["train"])
        return folder

    def prompts(self, host: HFModel, repetition: int) -> list[Tensor]:
        """What the host continues in one repetition: middles of files, shape [1, tokens] each."""
        settings = self.settings
        middles = [corpus.middle(text) for text in chosen(self.pair.text)["test"].values()]
        encoded = [host.encode(text[: 16 * settings.prompt_tokens]) for text in middles]
        long = [ids for ids in encoded if len(ids) >= settings.prompt_tokens]
        first = repetition * settings.prompts
        taken = [long[(first + number) % len(long)] for number in range(settings.prompts)]
        cut = [[*host.context_ids(), *ids[: settings.prompt_tokens]] for ids in taken]
        return [torch.tensor([ids], device=host.device) for ids in cut]

    @cached_property
    def expert(self) -> Path:
        """An expert of few steps: it drafts and steers as a better one would, token for token."""
        config = TuneConfig(
            model=self.small_ref,
            data=(str(self.train_text),),
            out=self.folder / "expert",
            max_tokens=self.settings.tune_tokens,
            validations=1,
            validation_tokens=512,
        )
        trimtab.tune(config, progress=self.display.progress)
        return config.out

    @cached_property
    def recording(self) -> Path:
        """Its recording, domain text and general text."""
        config = RecordConfig(
            expert=self.expert,
            out=self.folder / "recording",
            max_tokens=self.settings.record_tokens,
            general_tokens=self.settings.general_tokens,
        )
        trimtab.record(config, progress=self.display.progress)
        return config.out

    @cached_property
    def adapter(self) -> Path:
        """Head and memory of the recording."""
        config = FitConfig(
            recording=self.recording,
            out=self.folder / "speed.adapter",
            carriers=("head", "memory"),
            anchors=self.settings.anchors,
        )
        trimtab.fit(config, progress=self.display.progress)
        return config.out

    def large_adapter(self, small: HFModel) -> Path:
        """The same head beside a memory of many entries (see `grown`)."""
        entries = self.settings.memory_entries
        source = _told_apart(self.adapter / MANIFEST_NAME)
        out = self.folder / f"memory-{entries}-{source}.adapter"
        if (out / MANIFEST_NAME).is_file():
            return out
        manifest = read_manifest(self.adapter)
        file = read_memory(self.adapter, manifest)
        memory, carried = grown(file.memory, small, self.pair, entries), manifest.memory
        assert carried is not None and manifest.head is not None
        carriers = {
            "head": manifest.head.model_copy(update={"files": ()}),
            "memory": carried.model_copy(update={"files": (), "entries": entries}),
        }
        with replace_directory(out) as folder:
            for name in (HEAD_FILE, MOUNT_FILE):
                shutil.copyfile(self.adapter / name, folder / name)
            write_memory(folder, MemoryFile(memory, file.probe_features))
            write_adapter(folder, manifest.model_copy(update={"carriers": carriers, "files": {}}))
        return out

    def long_recording(self, small: HFModel) -> Path:
        """As many recorded tokens as the row `fit` is of: real text under states drawn at random.

        How long `fit` takes depends on the number of positions, not on which state stands where;
        each state pair is one that was recorded.
        """
        tokens = self.settings.fit_tokens
        out = self.folder / f"recording-{tokens}-{_told_apart(self.recording / RECORDING_NAME)}"
        if (out / RECORDING_NAME).is_file():
            return out
        source = Recording.open(self.recording)
        with replace_directory(out, marker=RECORDING_NAME) as folder:
            _lengthen(source, folder, *_columns(source, small, self.pair, tokens))
        return out


def _told_apart(manifest: Path) -> str:
    """What a source's manifest puts into the name of all that is made of the source."""
    return sha256_file(manifest)[:12]


def grown(memory: Memory, small: HFModel, pair: Pair, entries: int) -> Memory:
    """A memory of many entries: real text and its places, real keys repeated with noise.

    Args:
        memory: What was fitted.
        small: The model whose tokens the entries are.
        pair: Whose text is read on.
        entries: How many.
    """
    documents, names, places, count = [], [], [], 0
    lengths, spare = token_lengths(small.vocabulary), int(small.vocabulary.prefix_space)
    for name, text in endless(pair.text):
        ends = lengths[torch.tensor(small.encode(text), dtype=torch.long)].cumsum(0) - spare
        documents.append(text.encode())
        names.append(name)
        # Nothing follows the last token.
        places.append(ends[:-1])
        count += len(ends) - 1
        if count >= entries:
            break
    laid, starts = lay_out(documents)
    positions = torch.cat([start + ends for start, ends in zip(starts, places, strict=True)])
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(len(memory), (entries,), generator=generator)
    keys = [_noisy(memory.keys[part], generator) for part in drawn.split(65_536)]
    return replace(
        memory,
        keys=torch.cat(keys),
        text=laid,
        positions=positions[:entries],
        sources=Sources(tuple(names), tuple(starts)),
    )


def _noisy(keys: Tensor, generator: torch.Generator) -> Tensor:
    noise = torch.randn(keys.shape, generator=generator) * KEY_NOISE / keys.shape[1] ** 0.5
    return torch.nn.functional.normalize(keys.float() + noise, dim=-1).half()


def _columns(
    source: Recording, small: HFModel, pair: Pair, tokens: int
) -> tuple[dict[str, Tensor], list[dict[str, object]]]:
    """Recorded positions, and the documents that they are of."""
    ids, following, indices, listed, left = [], [], [], [], tokens
    for name, text in endless(pair.text):
        encoded = torch.tensor(small.encode(text)[:left], dtype=torch.int32)
        ids.append(encoded)
        following.append(torch.cat([encoded[1:], torch.tensor([-1], dtype=torch.int32)]))
        indices.append(torch.full((len(encoded),), len(listed), dtype=torch.int32))
        listed.append({"name": name, "tokens": len(encoded)})
        left -= len(encoded)
        if left <= 0:
            break
    recorded = source.read("train")
    drawn = torch.randint(
        len(recorded["token_ids"]), (tokens,), generator=torch.Generator().manual_seed(0)
    )
    columns = {
        "token_ids": torch.cat(ids),
        "next_ids": torch.cat(following),
        "document_index": torch.cat(indices),
        "reference_hidden": recorded["reference_hidden"][drawn],
        "expert_hidden": recorded["expert_hidden"][drawn],
    }
    return columns, listed


def _lengthen(
    source: Recording,
    folder: Path,
    columns: dict[str, Tensor],
    listed: list[dict[str, object]],
) -> None:
    """Write a recording whose training split is these columns, and all else as it was."""
    old = source.manifest
    documents = json.loads((source.folder / DOCUMENTS_NAME).read_text()) | {"train": listed}
    write_json(folder / DOCUMENTS_NAME, documents)
    kept = [shard for shard in old.shards if shard.split != "train"]
    for shard in kept:
        shutil.copyfile(source.folder / shard.file, folder / shard.file)
    entries, tokens = [], len(columns["token_ids"])
    for index, first in enumerate(range(0, tokens, SHARD_ROWS)):
        path = folder / shard_name("train", index)
        part = {name: column[first : first + SHARD_ROWS] for name, column in columns.items()}
        write_shard(path, part)
        entries.append(shard_entry(path, "train", rows=len(part["token_ids"])))
    train = SplitEntry(
        tokens=tokens, documents=len(listed), text_sha256=old.splits["train"].text_sha256
    )
    manifest = old.model_copy(
        update={
            "splits": old.splits | {"train": train},
            "shards": (*entries, *kept),
            "files": {DOCUMENTS_NAME: file_entry(folder / DOCUMENTS_NAME)},
        }
    )
    write_json(folder / RECORDING_NAME, manifest.model_dump(mode="json"))
