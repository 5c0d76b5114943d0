"""What a model, bare or steered, pays for texts, and what it answers to questions."""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from statistics import median

from torch import Tensor

from trimtab.backends.hf import HFModel
from trimtab.blend import mixture_logprobs
from trimtab.comparing.kept import Kept
from trimtab.comparing.measure import watched
from trimtab.comparing.questions import Question, Task
from trimtab.comparing.values import TextScore, Use
from trimtab.config import GenerateConfig
from trimtab.generate import generate
from trimtab.steering.answers import answer_evidence
from trimtab.steering.evidence import Mixture
from trimtab.steering.outgrown import refuse_outgrown
from trimtab.steering.predictors import Steering
from trimtab.steering.processor import steered_by
from trimtab.steering.scoring import score_document
from trimtab.types import Advance, Document, Progress, silent

TIMED_PROMPT_BYTES, TIMED_TOKENS = 240, 16
"""Of the generation that is timed."""


@dataclass(frozen=True)
class Subject:
    """A method that is ready to be measured.

    Attributes:
        model: What reads and writes: the host, or another model in its place.
        steering: What steers it, in one row; None for nothing.
        before: What stands before every question, after the model's preamble.
        trust: How far each predictor is trusted for an answer, shape [predictors]; None where
            nothing is known of that.
    """

    model: HFModel
    steering: Steering | None = None
    before: str = ""
    trust: Tensor | None = None

    @property
    def mixture(self) -> Mixture:
        """What answers: with nothing that steers, the model itself alone."""
        return Mixture(self.steering or Steering(("host",)), self.trust)


def score_texts(
    subject: Subject,
    texts: Mapping[str, Sequence[Document]],
    window: int,
    kept: Kept,
    progress: Progress,
) -> None:
    """Score texts in windows with half of each as context, as `evaluate` does.

    Args:
        subject: What is measured.
        texts: Documents by kind.
        window: Tokens of a window.
        kept: Gets each document's score; what it has is not scored again.
        progress: Shows the bytes.
    """
    total = sum(len(d.text.encode()) for documents in texts.values() for d in documents)
    with progress("scoring (bytes)", total) as advance:
        for kind, documents in texts.items():
            done = kept.scored(kind)
            if done:
                advance(sum(len(d.text.encode()) for d in documents[:done]))
            for document in documents[done:]:
                kept.add_score(kind, _score(subject, document, window))
                advance(len(document.text.encode()))


def _score(subject: Subject, document: Document, window: int) -> TextScore:
    steering = subject.mixture.steering
    scored = score_document(
        subject.model,
        document.text,
        steering,
        window_tokens=window,
        stride_tokens=max(window // 2, 1),
    )
    (row,) = steering.rows
    nats = -float(scored.rows[row].logprobs.sum())
    return TextScore(nats=nats, bytes=sum(scored.sizes))


def answer_all(subject: Subject, task: Task, kept: Kept, progress: Progress) -> None:
    """Answer every question: the likeliest choice, or what is written up to the line's end.

    A choice is as likely as the predictors find it *among the choices*, each trusted as far as
    the subject says (`choice_logprobs`).
    """
    answer = _written if task.kind == "text" else _chosen
    with progress("answering (questions)", len(task.questions)) as advance:
        done = kept.answered
        if done:
            advance(done)
        for question in task.questions[done:]:
            kept.add_answer(answer(subject, question))
            advance(1)


def _chosen(subject: Subject, question: Question) -> int:
    weights = subject.mixture.prior if subject.trust is None else subject.trust
    return int(mixture_logprobs(choice_logprobs(subject, question), weights[:, None]).argmax())


def choice_logprobs(subject: Subject, question: Question) -> Tensor:
    """How likely each predictor finds each choice, given that it is one of them.

    That the answer is one of a few labels is known, and what a predictor pays for knowing it too
    says nothing about which. Without this a memory that has seen the labels, and hardly tells
    them apart, outvotes a host that tells them apart and expects none of them.

    Args:
        subject: Whose predictors are asked.
        question: One with choices.

    Returns:
        Natural-log probabilities, shape [predictors, choices]; each row sums to one.
    """
    context, choices = _encoded(subject, question.prompt, question.choices)
    return answer_evidence(subject.model, subject.mixture, context, choices).log_softmax(-1)


def written_logprobs(subject: Subject, question: Question) -> Tensor:
    """How likely each predictor finds an answer that is written, and the line's end behind it.

    Args:
        subject: Whose predictors are asked.
        question: One without choices.

    Returns:
        Natural-log probabilities, shape [predictors].
    """
    context, answer = _encoded(subject, question.prompt, [f"{question.answer}\n"])
    return answer_evidence(subject.model, subject.mixture, context, answer)[:, 0]


def _encoded(
    subject: Subject, asked: str, texts: Sequence[str]
) -> tuple[list[int], list[list[int]]]:
    """Tokens before the answers, and of each answer."""
    model, prompt = subject.model, subject.before + asked
    # A space at the end of a prompt is part of the word that follows: tokenizers say so.
    bare = prompt.rstrip(" ")
    context = model.encode(bare)
    answers = []
    for text in texts:
        whole = model.encode(f"{prompt}{text}")
        answers.append(whole[len(context) :] or whole[-1:])
    before = [*model.context_ids(), *context]
    if not before:
        before, answers = answers[0][:1], [answer[1:] or answer for answer in answers]
    return before, answers


def _written(subject: Subject, question: Question) -> str:
    longest = max(8, 2 * len(subject.model.encode(question.answer)))
    return _generated(subject, subject.before + question.prompt, longest, ("\n",)).strip()


def _generated(
    subject: Subject,
    prompt: str,
    limit: int,
    stop: tuple[str, ...] = (),
    progress: Progress = silent,
) -> str:
    config = GenerateConfig(
        host=subject.model.ref, prompt=(prompt,), max_new_tokens=limit, stop=stop
    )
    model = subject.model
    if subject.steering is None:
        return generate(config, host=model, progress=progress).texts[0]
    with steered_by(model, subject.mixture) as outgrown:
        [text] = generate(config, host=model, progress=progress).texts
    refuse_outgrown(outgrown)
    return text


def timed_use(subject: Subject, text: str, progress: Progress) -> Use:
    """Time one short generation that goes on from the beginning of a text.

    The first token takes what the prompt takes; each further one the median of them, which a
    moment of other work on the machine does not move. Nothing ends it before it has all its tokens:
    the price of a token is not that of a short answer.
    """
    prompt, ends = text[:TIMED_PROMPT_BYTES], list[float]()
    lasting = replace(subject, model=replace(subject.model, never_ends=True))

    @contextmanager
    def timed(label: str, total: int) -> Iterator[Advance]:
        with progress(label, total) as advance:

            def told(units: int) -> None:
                ends.append(time.perf_counter())
                advance(units)

            yield told

    with watched() as watch:
        started = time.perf_counter()
        _generated(lasting, subject.before + prompt, TIMED_TOKENS, progress=timed)
    model = subject.model
    read = len(model.context_ids()) + len(model.encode(subject.before + prompt))
    written = max(len(ends), 1)
    steps = [after - before for before, after in pairwise(ends)]
    first = ends[0] - started if ends else watch.sec
    return Use(
        sec_per_token=(first + (written - 1) * median(steps or [0.0])) / written,
        prompt_tokens=read,
        answer_tokens=written,
        peak_bytes=watch.peak_bytes,
        sec=watch.sec,
        cpu_sec=watch.cpu_sec,
    )


def with_preamble(model: HFModel, token_ids: Sequence[int]) -> HFModel:
    """A model that reads some tokens before everything else."""
    return replace(model, preamble=tuple(token_ids))
