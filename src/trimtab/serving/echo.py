"""A prompt said again, with how likely each of its tokens was."""

from collections.abc import Callable, Sequence

from torch import Tensor

from trimtab.backends.hf import HFModel
from trimtab.serving.rows import likely
from trimtab.serving.work import Job, Likely, Prompt
from trimtab.steering.evidence import ReadPrompt, text_before
from trimtab.steering.field import logits_in_chunks
from trimtab.steering.pieces import Pieces


def echoing(
    host: HFModel, job: Job, prompt: Prompt, read: ReadPrompt, few: Callable[[], int | None]
) -> Pieces[tuple[str, tuple[Likely, ...]]]:
    """The text of a prompt and, where they are asked for, the log-probabilities of its tokens.

    A steered prompt is scored as `evaluate` scores a text: each token by the predictors as those
    before it have weighed them.

    Args:
        host: The host.
        job: Whose prompt it is.
        prompt: The prompt.
        read: The same as the host has read it, with the states of all tokens, and with a row of
            the small models that nothing else reads.
        few: As for `Several.prequential`.
    """
    text = text_before(read.token_bytes[prompt.shown_from :]).decode("utf-8", "replace")
    top = job.options.top_logprobs
    if top is None:
        return text, ()
    ids = prompt.token_ids
    told = [Likely(ids[0], None)]

    def tell(places: Sequence[int], logprobs: Tensor) -> None:
        pairs = zip(places, logprobs, strict=True)
        told.extend(likely(row, ids[place + 1], top) for place, row in pairs)

    yield
    if job.steered:
        yield from job.steered.several.prequential(host.unembedding, read, tell, few)
    else:
        for places, logits in logits_in_chunks(host.unembedding, read.hidden[:-1]):
            tell(places, logits.log_softmax(-1))
            yield
    return text, tuple(told[prompt.shown_from :])
