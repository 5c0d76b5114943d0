"""The texts of the translation bench: training, general, and held-out pairs of two manuals."""

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.translation.corpus import (
    Pair,
    read_general,
    read_gimp,
    read_handbook,
    write_pairs,
    write_texts,
)
from trimtab.store.files import read_json, write_json

TEST_CHAPTERS = ("apt", "security", "solving-problems")
DOCUMENT_PARAGRAPHS = 8
GENERAL_TEXTS = 8
SETS = ("handbook", "gimp")


@dataclass(frozen=True)
class Data:
    """Where the bench's texts lie.

    Attributes:
        folder: Of all of them.
    """

    folder: Path

    @property
    def train(self) -> Path:
        """French text of the handbook's other chapters."""
        return self.folder / "train.jsonl"

    @property
    def general(self) -> Path:
        """French text of another kind."""
        return self.folder / "general.jsonl"

    def pairs(self, name: str) -> Path:
        """Held-out pairs: `handbook` or `gimp`."""
        return self.folder / f"{name}.jsonl"


def prepare(folder: Path, sentences: int, seed: int) -> Data:
    """Fetch the manuals and write the bench's texts, unless they are there.

    Args:
        folder: Of the texts.
        sentences: Held-out pairs of each manual.
        seed: Chooses them.

    Raises:
        SourceError: A package cannot be fetched.
        StorageError: The disk is full or the folder cannot be written.
    """
    data, asked = Data(folder), {"sentences": sentences, "seed": seed}
    done = folder / "data.json"
    if done.exists() and read_json(done, "the bench's texts")["asked"] == asked:
        return data
    cache = folder.parent / "cache"
    handbook, gimp = read_handbook(cache), read_gimp(cache)
    folder.mkdir(parents=True, exist_ok=True)
    write_texts(data.train, list(_training(handbook.texts)))
    chosen = random.Random(seed).sample(read_general(cache), GENERAL_TEXTS)
    write_texts(data.general, chosen)
    test = [pair for pair in handbook.pairs if pair.chapter in TEST_CHAPTERS]
    write_pairs(data.pairs("handbook"), _sample(test, sentences, seed))
    write_pairs(data.pairs("gimp"), _sample(gimp.pairs, sentences, seed))
    versions = {**handbook.versions, **gimp.versions}
    write_json(done, {"schema": 1, "asked": asked, "packages": versions})
    return data


def _training(texts: Mapping[str, Sequence[str]]) -> Iterator[str]:
    for chapter, found in texts.items():
        if chapter in TEST_CHAPTERS:
            continue
        for first in range(0, len(found), DOCUMENT_PARAGRAPHS):
            yield "\n\n".join(found[first : first + DOCUMENT_PARAGRAPHS]) + "\n"


def _sample(pairs: Sequence[Pair], count: int, seed: int) -> list[Pair]:
    return random.Random(seed).sample(list(pairs), min(count, len(pairs)))
