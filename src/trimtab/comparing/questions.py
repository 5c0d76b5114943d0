"""The user's own task: questions with an answer, from a JSONL file. Pure but for the reading."""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from trimtab.errors import InputError
from trimtab.text.documents import json_lines, shown_name

MOST_CLASSES = 20
"""Different answers up to which a file without choices is a classification."""

Kind = Literal["choice", "classes", "text"]
"""Choose among a question's own choices; name one of a few classes; write the answer."""

METRICS: dict[Kind, tuple[str, ...]] = {
    "choice": ("accuracy",),
    "classes": ("accuracy", "macro-F1"),
    "text": ("exact match",),
}
_EXPECTED = 'expected "prompt" and "answer", both strings, and perhaps "choices", a list of strings'
_MEND = "mend or remove that line"


@dataclass(frozen=True)
class Question:
    """One question.

    Attributes:
        prompt: What the model reads.
        answer: The right answer.
        choices: Answers to choose from, the right one among them; empty where it is written.
    """

    prompt: str
    answer: str
    choices: tuple[str, ...] = ()

    @property
    def right(self) -> int:
        """Place of the right answer among the choices."""
        return self.choices.index(self.answer)


@dataclass(frozen=True)
class Task:
    """All questions of a file.

    Attributes:
        kind: How they are answered.
        questions: The questions; with classes, each has all of them as choices.
    """

    kind: Kind
    questions: tuple[Question, ...]


def read_questions(path: Path) -> Task:
    """Read a task: lines with `prompt`, `answer` and perhaps `choices`.

    Where no line has choices and there are few different answers, each of which some lines share,
    these are classes to choose from. An answer follows its prompt directly: a space between the
    two is part of one of them.

    Raises:
        InputError: The file cannot be read, or a line is no question; it names the line.
    """
    found = [
        _question(value, f"line {number} of {shown_name(path)}")
        for number, value in json_lines(path)
    ]
    if not found:
        raise InputError(f"{shown_name(path)} holds no question", hint=f"{_EXPECTED}, a line")
    if any(question.choices for question in found):
        if not all(question.choices for question in found):
            raise InputError(
                f"some lines of {shown_name(path)} have choices and some have none",
                hint="give all of them choices, or none",
            )
        return Task("choice", tuple(found))
    counts = Counter(question.answer for question in found)
    if len(counts) == 1 and len(found) > 1:
        raise InputError(
            f"all {len(found)} answers of {shown_name(path)} are {found[0].answer!r}: there is"
            " nothing to tell apart",
            hint="give questions of two classes at least",
        )
    if not 2 <= len(counts) <= MOST_CLASSES or len(found) < 2 * len(counts):
        return Task("text", tuple(found))
    classes = tuple(sorted(counts))
    return Task("classes", tuple(Question(q.prompt, q.answer, classes) for q in found))


def _question(value: Any, where: str) -> Question:
    if wrong := _wrong(value):
        raise InputError(f"{where} is no question, {wrong}: {_EXPECTED}", hint=_MEND)
    answer, choices = value["answer"], tuple(value.get("choices") or ())
    if choices and len(set(choices)) < max(2, len(choices)):
        raise InputError(f"{where} needs two choices or more, all different", hint=_MEND)
    if choices and answer not in choices:
        raise InputError(
            f"{where} has the answer {answer!r}, which has to be one of its choices, space by"
            " space",
            hint=_MEND,
        )
    return Question(value["prompt"], answer, choices)


def _wrong(value: Any) -> str:
    """What keeps a line from being a question; "" if nothing does."""
    if not isinstance(value, dict):
        return "since it is no JSON object"
    for name in ("prompt", "answer"):
        part = value.get(name)
        if not isinstance(part, str) or not part:
            found = "is missing" if name not in value else f"is {json.dumps(part)[:40]}"
            return f'since its "{name}" {found}'
    choices = value.get("choices") or []
    if not isinstance(choices, list) or not all(isinstance(c, str) and c for c in choices):
        return f'since its "choices" are {json.dumps(choices)[:40]}'
    return ""


def scores(task: Task, answers: Sequence[int | str]) -> list[float]:
    """1 for each question that is answered rightly, else 0."""
    if task.kind == "text":
        return [float(a == q.answer.strip()) for a, q in zip(answers, task.questions, strict=True)]
    return [float(a == q.right) for a, q in zip(answers, task.questions, strict=True)]


def metric(name: str, task: Task, answers: Sequence[int | str], drawn: np.ndarray) -> np.ndarray:
    """A metric of each resample of the questions.

    Macro-F1 is the mean over the classes that the sample has of 2 TP / (2 TP + FP + FN).

    Args:
        name: One of METRICS.
        task: The questions.
        answers: What was answered.
        drawn: Places of questions, shape [resamples, questions].

    Returns:
        Shape [resamples], each in [0, 1].
    """
    if name != "macro-F1":
        return np.array(scores(task, answers))[drawn].mean(1)
    right = np.array([question.right for question in task.questions])[drawn]
    chosen = np.array(answers)[drawn]
    total, present = np.zeros(len(drawn)), np.zeros(len(drawn))
    for label in range(len(task.questions[0].choices)):
        both = ((right == label) & (chosen == label)).sum(1)
        either = (right == label).sum(1) + (chosen == label).sum(1)
        there = (right == label).any(1)
        total += np.where(there, 2 * both / np.maximum(either, 1), 0.0)
        present += there
    return total / present
