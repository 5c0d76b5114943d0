"""A prompt said again, with how likely each of its tokens was."""

from collections.abc import Iterator, Sequence

from torch import Tensor

from trimtab.backends.hf import HFModel
from trimtab.serving.rows import likely
from trimtab.serving.work import Job, Likely, Prompt
from trimtab.steering.evidence import ReadPrompt, text_before
from trimtab.steering.field import logits_in_chunks
from trimtab.steering.pieces import Pieces


def echoing(
    host: HFModel, job: Job, prompt: Prompt, read: ReadPrompt
) -> Pieces[tuple[str, tuple[Likely, ...]]]:
    """The text of a prompt and, where they are asked for, the log-probabilities of its tokens.

    A steered prompt is scored as `evaluate` scores a text: each token by the predictors as those
    before it have weighed them.

    Args:
        host: The host.
        job: Whose prompt it is.
        prompt: The prompt.
        read: The same as the host has read it, with the states of all tokens.
    """
    text = text_before(read.token_bytes[prompt.shown_from :]).decode("utf-8", "replace")
    top = job.options.top_logprobs
    if top is None:
        return text, ()
    ids = prompt.token_ids
    told = [Likely(ids[0], None)]
    yield
    for places, logprobs in _distributions(host, job, read):
        yield
        told += [likely(row, ids[p + 1], top) for p, row in zip(places, logprobs, strict=True)]
    return text, tuple(told[prompt.shown_from :])


def _distributions(
    host: HFModel, job: Job, read: ReadPrompt
) -> Iterator[tuple[Sequence[int], Tensor]]:
    if job.steered:
        yield from job.steered.several.prequential(host.unembedding, read)
        return
    for places, logits in logits_in_chunks(host.unembedding, read.hidden[:-1]):
        yield places, logits.log_softmax(-1)
