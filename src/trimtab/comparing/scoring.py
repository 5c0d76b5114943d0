"""What a model, bare or steered, pays for texts, and what it answers to questions."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from trimtab.backends.hf import HFModel
from trimtab.comparing.measure import watched
from trimtab.comparing.questions import Question, Task
from trimtab.comparing.values import TextScore, Use
from trimtab.config import GenerateConfig
from trimtab.generate import generate
from trimtab.steering.answers import score_answers
from trimtab.steering.evidence import Mixture
from trimtab.steering.predictors import Steering
from trimtab.steering.processor import steered_by
from trimtab.steering.scoring import score_document
from trimtab.types import Document, Progress

Guard = Callable[[float], None]
"""Told which share of some work is done; raises where the rest would take too long."""

TIMED_PROMPT_BYTES, TIMED_TOKENS = 240, 16
"""Of the generation that is timed."""


@dataclass(frozen=True)
class Subject:
    """A method that is ready to be measured.

    Attributes:
        model: What reads and writes: the host, or another model in its place.
        steering: What steers it, in one row; None for nothing.
        before: What stands before every question, after the model's preamble.
    """

    model: HFModel
    steering: Steering | None = None
    before: str = ""

    @property
    def mixture(self) -> Mixture:
        """What answers: with nothing that steers, the model itself alone."""
        return Mixture(self.steering or Steering(("host",)))


def score_texts(
    subject: Subject,
    texts: Mapping[str, Sequence[Document]],
    window: int,
    progress: Progress,
    guard: Guard,
) -> dict[str, tuple[TextScore, ...]]:
    """Score texts in windows with half of each as context, as `evaluate` does.

    Args:
        subject: What is measured.
        texts: Documents by kind.
        window: Tokens of a window.
        progress: Shows the bytes.
        guard: Told after each document which share of the bytes is done; may end the work.
    """
    done = 0
    steering = subject.mixture.steering
    (row,) = steering.rows
    found: dict[str, tuple[TextScore, ...]] = {}
    total = sum(len(d.text.encode()) for documents in texts.values() for d in documents)
    with progress("scoring (bytes)", total) as advance:
        for kind, documents in texts.items():
            scores = []
            for document in documents:
                scored = score_document(
                    subject.model,
                    document.text,
                    steering,
                    window_tokens=window,
                    stride_tokens=max(window // 2, 1),
                )
                nats = -float(scored.rows[row].logprobs.sum())
                scores.append(TextScore(nats=nats, bytes=sum(scored.sizes)))
                size = len(document.text.encode())
                done += size
                advance(size)
                guard(done / total)
            found[kind] = tuple(scores)
    return found


def answer_all(
    subject: Subject, task: Task, progress: Progress, guard: Guard
) -> tuple[int | str, ...]:
    """Answer every question: the likeliest choice, or what is written up to the line's end.

    A choice's likelihood is that of its whole text after the prompt (`score_answers`).
    """
    with progress("answering (questions)", len(task.questions)) as advance:
        found: list[int | str] = []
        for number, question in enumerate(task.questions, start=1):
            written = task.kind == "text"
            found.append(_written(subject, question) if written else _chosen(subject, question))
            advance(1)
            guard(number / len(task.questions))
    return tuple(found)


def _chosen(subject: Subject, question: Question) -> int:
    model, prompt = subject.model, subject.before + question.prompt
    # A space at the end of a prompt is part of the word that follows: tokenizers say so.
    bare = prompt.rstrip(" ")
    context = model.encode(bare)
    answers = []
    for choice in question.choices:
        whole = model.encode(f"{prompt}{choice}")
        answers.append(whole[len(context) :] or whole[-1:])
    before = [*model.context_ids(), *context]
    if not before:
        before, answers = answers[0][:1], [answer[1:] or answer for answer in answers]
    scores = score_answers(model, subject.mixture, before, answers)
    return max(range(len(scores)), key=lambda number: float(scores[number].logprobs.sum()))


def _written(subject: Subject, question: Question) -> str:
    longest = max(8, 2 * len(subject.model.encode(question.answer)))
    text, _ = _generated(subject, subject.before + question.prompt, longest, ("\n",))
    return text.strip()


def _generated(subject: Subject, prompt: str, limit: int, stop: tuple[str, ...]) -> tuple[str, int]:
    config = GenerateConfig(
        host=subject.model.ref, prompt=(prompt,), max_new_tokens=limit, stop=stop
    )
    if subject.steering is None:
        result = generate(config, host=subject.model)
    else:
        with steered_by(subject.model, subject.mixture):
            result = generate(config, host=subject.model)
    return result.texts[0], result.tokens[0]


def timed_use(subject: Subject, text: str) -> Use:
    """Time one short generation that goes on from the beginning of a text."""
    prompt = text[:TIMED_PROMPT_BYTES]
    with watched() as watch:
        _, tokens = _generated(subject, subject.before + prompt, TIMED_TOKENS, ())
    model = subject.model
    read = len(model.context_ids()) + len(model.encode(subject.before + prompt))
    written = max(tokens, 1)
    return Use(
        sec_per_token=watch.sec / written,
        prompt_tokens=read,
        answer_tokens=written,
        peak_bytes=watch.peak_bytes,
    )


def with_preamble(model: HFModel, token_ids: Sequence[int]) -> HFModel:
    """A model that reads some tokens before everything else."""
    return replace(model, preamble=tuple(token_ids))
