"""Results of methods on disk: finished ones, and what an interrupted one had found so far."""

from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar, final

from pydantic import ValidationError

from trimtab.comparing.values import MethodResult, Part, TextScore, Unfinished
from trimtab.errors import InputError
from trimtab.store.files import read_json, write_json

FOLDER, STEPS = "methods", "steps"
"""Folders of a comparison: what each method gave, and what each step took."""

_UNFINISHED = ".unfinished.json"

Read = TypeVar("Read", bound=Part)


def result_path(folder: Path, method: str) -> Path:
    """Where a comparison keeps the result of a method."""
    return folder / FOLDER / f"{method}.json"


def read_result(path: Path, key: str) -> MethodResult | None:
    """A kept result, unless it was found from something else.

    Raises:
        InputError: The file is no result of a method.
    """
    return _read(path, key, MethodResult)


def write_result(path: Path, result: MethodResult) -> None:
    """Keep a result; with all that it should hold, what was kept on the way to it goes."""
    write_json(path, result.model_dump(mode="json"))
    if result.is_whole:
        path.with_suffix(_UNFINISHED).unlink(missing_ok=True)


@final
class Kept:
    """Scores and answers of a method, each on disk as soon as it is there."""

    def __init__(self, path: Path, key: str) -> None:
        """Go on where an interrupted run was.

        Args:
            path: Of the method's result, beside which they lie.
            key: Names all that decides them.

        Raises:
            InputError: The file is not what such a run leaves.
        """
        self._path = path.with_suffix(_UNFINISHED)
        self._found = _read(self._path, key, Unfinished) or Unfinished(key=key)

    @property
    def texts(self) -> dict[str, tuple[TextScore, ...]]:
        """Scores by kind, in the order of the documents."""
        return dict(self._found.texts)

    @property
    def answers(self) -> tuple[int | str, ...]:
        """Answers, in the order of the questions."""
        return self._found.answers

    @property
    def answered(self) -> int:
        """How many questions are answered."""
        return len(self._found.answers)

    @property
    def solved(self) -> tuple[tuple[float, ...], ...]:
        """What each predictor gives to the answers of solved questions, in their order."""
        return self._found.solved

    def scored(self, kind: str) -> int:
        """How many documents of a kind are scored."""
        return len(self._found.texts.get(kind, ()))

    def add_score(self, kind: str, score: TextScore) -> None:
        """Keep the score of the next document of a kind."""
        scores: Sequence[TextScore] = self._found.texts.get(kind, ())
        self._write(texts=self._found.texts | {kind: (*scores, score)})

    def add_answer(self, answer: int | str) -> None:
        """Keep the answer to the next question."""
        self._write(answers=(*self._found.answers, answer))

    def add_solved(self, nats: Sequence[float]) -> None:
        """Keep what each predictor gives to the answer of the next solved question."""
        self._write(solved=(*self._found.solved, tuple(nats)))

    def _write(self, **changed: object) -> None:
        self._found = self._found.model_copy(update=changed)
        write_json(self._path, self._found.model_dump(mode="json"))


def _read(path: Path, key: str, form: type[Read]) -> Read | None:
    if not path.is_file():
        return None
    content = read_json(path, "result of a method")
    if content.get("key") != key:
        return None
    try:
        return form.model_validate(content)
    except ValidationError as error:
        raise InputError(
            f"{path} is no result of a method: {error.error_count()} errors",
            hint="delete the file, and the method is run again",
        ) from error
