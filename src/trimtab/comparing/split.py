"""One split of the user's data, the same for every method, kept in the comparison's folder."""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from trimtab.comparing.questions import Question, Task, read_questions
from trimtab.config import CompareConfig
from trimtab.errors import InputError
from trimtab.store.files import sha256_bytes, sha256_file, write_atomic
from trimtab.text.corpus import (
    drop_near_duplicates,
    save_documents,
    sha256_of_documents,
    split_held_out,
)
from trimtab.text.documents import read_by_kind, read_documents
from trimtab.text.probe import probe_documents
from trimtab.types import Document

TRAIN_NAME, TEST_NAME = "train.jsonl", "test.jsonl"
ASKED_NAME = "asked.jsonl"


@dataclass(frozen=True)
class Split:
    """The data of a comparison.

    Attributes:
        train: Domain text to learn from.
        test: Domain text that methods are measured on.
        general: General text to measure, by kind.
        general_train: General text that the adapter is told to leave alone; no test text.
        examples: Questions to learn from; empty without a task.
        task: Questions to be answered; None without a task.
        repeated: Questions that were not learnt from, since they are asked.
        sha256: Fingerprint of all of it.
    """

    train: tuple[Document, ...]
    test: tuple[Document, ...]
    general: dict[str, tuple[Document, ...]]
    general_train: tuple[Document, ...]
    examples: tuple[Question, ...]
    task: Task | None
    repeated: int
    sha256: str


def split_data(config: CompareConfig) -> Split:
    """Read and split text and questions.

    Test documents are drawn by name and seed, unless --test names them; training documents that
    nearly repeat one are removed, and so are solved questions that are asked. Solved training
    questions are training text too, so that every method that learns has seen them. Without text,
    the asked questions with their answers are what is scored.

    Raises:
        InputError: A text or a question cannot be read, or nothing is left to learn from.
    """
    examples, task, repeated = _questions(config)
    train, test = _texts(config, task)
    train = list(drop_near_duplicates(train, test).kept)
    train += _as_text(config, "learnt", examples)
    if not train:
        raise InputError(
            "every training document nearly repeats a test document",
            hint="give other text in --test, or more text",
        )
    general, general_train = _general(config)
    parts = [train, test, general_train, *general.values()]
    digest = hashlib.sha256("".join(map(sha256_of_documents, parts)).encode())
    if config.task is not None:
        digest.update(f"{sha256_file(config.task)} {config.task_questions}".encode())
    kinds = {kind: tuple(found) for kind, found in general.items()}
    return Split(
        train=tuple(train),
        test=tuple(test),
        general=kinds,
        general_train=tuple(general_train),
        examples=examples,
        task=task,
        repeated=repeated,
        sha256=digest.hexdigest(),
    )


def _texts(config: CompareConfig, task: Task | None) -> tuple[list[Document], list[Document]]:
    """Text to learn from besides solved questions, and text that is scored."""
    documents = _plain(read_documents(config.data)) if config.data else []
    if config.test:
        return documents, _plain(read_documents(config.test))
    if task is not None and not documents:
        return [], _as_text(config, "asked", task.questions)
    return split_held_out(documents, config.test_share, config.seed)


def _as_text(config: CompareConfig, part: str, questions: Sequence[Question]) -> list[Document]:
    name = f"{config.task}#{part}"
    return [Document(f"{name}-{n}", f"{q.prompt}{q.answer}\n") for n, q in enumerate(questions)]


def _plain(documents: list[Document]) -> list[Document]:
    for document in documents:
        if document.source is not None:
            raise InputError(
                f"{document.name} has a source, and hosts that continue a text are compared:"
                " none of them would read it",
                hint="write source and target into one text, or as prompt and answer into --task",
            )
    return documents


def _questions(config: CompareConfig) -> tuple[tuple[Question, ...], Task | None, int]:
    """Questions to learn from, those to ask, and how many of the first are among the second."""
    if config.task is None:
        return (), None, 0
    task = read_questions(config.task)
    numbered = [Document(n, n) for n in map(str, range(len(task.questions)))]
    if len(numbered) < 4:
        raise InputError(
            f"{config.task} has too few questions: {len(numbered)}, expected at least 4",
            hint="give more questions: some are learnt from, the others are asked",
        )
    learnt, asked = split_held_out(numbered, 0.5, config.seed)
    pick = task.questions
    chosen = tuple(pick[int(document.name)] for document in asked[: config.task_questions])
    kept, repeated = _not_asked([pick[int(document.name)] for document in learnt], chosen)
    if not kept:
        raise InputError(
            f"every question of {config.task} to learn from is asked too",
            hint="give questions that differ",
        )
    return kept, Task(task.kind, chosen), repeated


def _not_asked(
    learnt: Sequence[Question], asked: Sequence[Question]
) -> tuple[tuple[Question, ...], int]:
    """Questions without those that are asked, but for letter case and spaces; how many go.

    Only the same prompt counts, not a similar one: prompts of one form are all similar.
    """
    known = {_bare(question) for question in asked}
    kept = tuple(question for question in learnt if _bare(question) not in known)
    return kept, len(learnt) - len(kept)


def _bare(question: Question) -> str:
    return " ".join(question.prompt.casefold().split())


def _general(config: CompareConfig) -> tuple[dict[str, list[Document]], list[Document]]:
    """General text by kind, of which half is measured and half may be learnt from."""
    texts = {kind: _plain(d) for kind, d in read_by_kind(config.general).items()} or {
        "probe": probe_documents()
    }
    measured: dict[str, list[Document]] = {}
    learnt: list[Document] = []
    for kind, documents in texts.items():
        mine, measured[kind] = split_held_out(documents, 0.5, config.seed)
        learnt += mine
    return measured, learnt


def write_split(split: Split, folder: Path) -> None:
    """Write the texts that methods learn from, and those that they are measured on."""
    save_documents(folder / TRAIN_NAME, split.train)
    save_documents(folder / TEST_NAME, split.test)
    save_documents(folder / "general.jsonl", split.general_train)
    if split.task is not None:
        lines = (json.dumps(asdict(q), ensure_ascii=False) for q in split.task.questions)
        write_atomic(folder / ASKED_NAME, "".join(f"{line}\n" for line in lines).encode())


def excerpts(
    documents: Sequence[Document], tokens_of: Callable[[str], list[int]], limit: int
) -> list[int]:
    """The beginnings of documents, each with an equal share of so many tokens.

    Args:
        documents: Training text.
        tokens_of: A host's tokens of a text.
        limit: Tokens in all.
    """
    found: list[int] = []
    for number, document in enumerate(documents):
        share = max(1, (limit - len(found)) // (len(documents) - number))
        found += tokens_of(document.text)[:share]
        if len(found) >= limit:
            break
    return found[:limit]


def key_of(*parts: object) -> str:
    """Name a result by all that decides it."""
    return sha256_bytes(json.dumps([str(part) for part in parts]).encode())[:32]
