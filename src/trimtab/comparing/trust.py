"""How far each predictor is trusted for an answer: what the solved questions say of it."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from trimtab.blend import evidence_weights
from trimtab.carriers.memory import documents_of
from trimtab.carriers.recall import MountedMemory
from trimtab.comparing.kept import Kept
from trimtab.comparing.questions import Kind, Question
from trimtab.comparing.scoring import Subject, choice_logprobs, written_logprobs
from trimtab.text.duplicates import near_repeats
from trimtab.types import Document, Progress

MOST_SOLVED = 128
"""Solved questions that are looked at: some dozens tell predictors apart."""


def learnt_trust(
    subject: Subject, kind: Kind, solved: Sequence[Question], kept: Kept, progress: Progress
) -> Tensor | None:
    """Trust each predictor as far as the answers of solved questions speak for it.

    A prompt's own text, which is the evidence where text goes on, says which predictor writes
    such prompts best: a memory of such text, that is. Which one *answers* best is another thing,
    and only answers tell it. The weights are the Bayesian mixture's after the solved questions
    (`evidence_weights`; questions have no order, so nothing is dealt out again between them): on
    these it pays at most -ln(prior) more than any one predictor, the bare host above all.

    A memory holds the solved questions, answers and all. So each is asked of a memory without the
    documents that nearly repeat it, as those that repeat a question to be asked were left out
    when it was made. Expert and head have learnt from the questions too, which is not undone.

    Args:
        subject: What is to answer.
        kind: How questions are answered.
        solved: Questions that were learnt from; evenly spaced ones where there are too many.
        kept: Gets what each question says; what it has is not asked again.
        progress: Shows the questions.

    Returns:
        Weights that sum to one, shape [predictors]; None where there is one predictor alone, or no
        solved question.
    """
    mixture = subject.mixture
    if len(mixture.members) == 1 or not solved:
        return None
    count = min(len(solved), MOST_SOLVED)
    solved = [solved[place * len(solved) // count] for place in range(count)]
    memories = mixture.steering.memories
    hidden = {name: _repeats(memory, solved) for name, memory in memories.items()}
    with progress("learning whom to trust (questions)", count) as advance:
        done = len(kept.solved)
        if done:
            advance(done)
        for number, question in enumerate(solved[done:], done):
            left_out = {name: each[number] for name, each in hidden.items()}
            kept.add_solved(_said(_without(subject, left_out), kind, question).tolist())
            advance(1)
    return evidence_weights(torch.tensor(kept.solved).T, mixture.prior)[:, -1].float()


def _said(subject: Subject, kind: Kind, question: Question) -> Tensor:
    """What each predictor gives to the right answer, in nats, shape [predictors]."""
    if kind == "text":
        return written_logprobs(subject, question)
    return choice_logprobs(subject, question)[:, question.right]


def _repeats(memory: MountedMemory, questions: Sequence[Question]) -> list[Tensor]:
    """For each question the entries of documents that nearly repeat it: True for them."""
    documents, starts = documents_of(memory.memory.text)
    texts = [Document(str(n), text.decode("utf-8", "replace")) for n, text in enumerate(documents)]
    asked = [Document(str(n), f"{q.prompt}{q.answer}\n") for n, q in enumerate(questions)]
    owner = torch.bucketize(memory.memory.positions, torch.tensor(starts), right=True) - 1
    found = near_repeats(texts, asked)
    return [torch.isin(owner, torch.tensor(each, dtype=torch.long)) for each in found]


def _without(subject: Subject, left_out: Mapping[str, Tensor]) -> Subject:
    """The subject with some of its memories' entries forgotten."""
    steering = subject.steering
    if steering is None or not any(bool(entries.any()) for entries in left_out.values()):
        return subject
    memories = dict(steering.memories)
    for name, entries in left_out.items():
        if entries.any():
            memories[name] = memories[name].only(~entries)
    return replace(subject, steering=replace(steering, memories=memories))
