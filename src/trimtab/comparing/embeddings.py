"""The simple baseline of a classification: logistic regression on the small model's states."""

from collections.abc import Sequence
from typing import Any

import torch

from trimtab.backends.hf import HFModel
from trimtab.backends.open import one_device, open_model
from trimtab.comparing.bench import Bench
from trimtab.comparing.budget import NotRun
from trimtab.comparing.measure import watched
from trimtab.comparing.questions import Question
from trimtab.comparing.sizes import reading_flops
from trimtab.comparing.values import Step, Use

MOST_TOKENS = 512
"""Of a prompt; of longer ones the beginning is read."""


def classify(bench: Bench) -> tuple[tuple[int, ...], Step, Use, int]:
    """Fit the baseline on the training questions and let it answer the others.

    An embedding is the mean of the small model's final hidden states over the prompt, before any
    tuning; the regression has an L2 penalty whose weight five-fold cross-validation chooses.

    Returns:
        The answers, the step, what an answer costs, and the bytes that have to be kept.

    Raises:
        NotRun: The task is no classification, or scikit-learn is not installed.
    """
    task, examples = bench.split.task, bench.split.examples
    if task is None or task.kind != "classes":
        raise NotRun(
            "it answers classifications alone: tasks without choices where a few answers recur"
        )
    try:
        from sklearn.linear_model import LogisticRegressionCV
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler
    except ModuleNotFoundError as error:
        raise NotRun("it needs scikit-learn: pip install 'trimtab[compare]'") from error
    labels = [question.answer for question in examples]
    if min((labels.count(label) for label in set(labels)), default=0) < 2 or len(set(labels)) < 2:
        raise NotRun("it needs two training questions of each of two classes at least")
    model = open_model(
        bench.config.small,
        dtype=bench.config.dtype,
        device_map=one_device(),
        progress=bench.progress,
    )
    with watched() as watch:
        folds = min(5, *(labels.count(label) for label in set(labels)))
        # Each is said, since scikit-learn is about to change what it takes for none.
        settings: dict[str, Any] = {"Cs": 5, "cv": folds, "max_iter": 2_000}
        settings |= {"l1_ratios": (0.0,), "scoring": "accuracy", "use_legacy_attributes": False}
        fitted = make_pipeline(StandardScaler(), LogisticRegressionCV(**settings))
        fitted.fit(embeddings(model, examples).numpy(), labels)
    tokens = sum(len(model.encode(question.prompt)) for question in examples)
    step = watch.step("fit embeddings", reading_flops(bench.small_shape, tokens, MOST_TOKENS))
    with watched() as answering:
        said = fitted.predict(embeddings(model, task.questions).numpy()).tolist()
    classes = task.questions[0].choices
    asked = sum(len(model.encode(question.prompt)) for question in task.questions)
    use = Use(
        sec_per_token=answering.sec / len(task.questions),
        prompt_tokens=round(asked / len(task.questions)),
        answer_tokens=1,
        peak_bytes=answering.peak_bytes,
    )
    size = 4 * (model.unembedding.weight.shape[1] + 1) * len(classes)
    return tuple(classes.index(label) for label in said), step, use, size


def embeddings(model: HFModel, questions: Sequence[Question]) -> torch.Tensor:
    """Mean hidden state of each prompt, shape [questions, hidden], float32."""
    found = []
    for question in questions:
        ids = model.encode(question.prompt)[:MOST_TOKENS] or [0]
        before = model.context_ids()
        with torch.inference_mode():
            states = model.hidden(torch.tensor([[*before, *ids]], device=model.device))
        found.append(states[0, len(before) :].float().mean(0).cpu())
    return torch.stack(found)
