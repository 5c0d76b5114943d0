"""Which tokens of a forward pass belong to which request. Pure.

vLLM reads the tokens of all requests, one request after another, and tells a logits processor
neither where one ends nor how many each has; but what it does tell determines it.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from trimtab.vllm.stash import Pass


def spans_by_ends(read: Pass, ends: Sequence[int]) -> list[range]:
    """Tokens of each request, where the position of each one's last token is known.

    Args:
        read: The pass.
        ends: Position of the last token that was read, of each request.
    """
    positions, found, begin = read.positions.tolist(), [], 0
    for end in ends:
        span = range(begin, begin + end - positions[begin] + 1)
        found.append(span)
        begin = span.stop
    return found


def spans_by_texts(read: Pass, texts: Sequence[Sequence[int]], sampled: Tensor) -> list[range]:
    """Tokens of each request, where their texts and the states of their last tokens are known.

    A request's tokens are the longest run that its text goes on with; but a prompt may be read in
    parts, and the next request might by chance go on with the same tokens at the next positions.
    So the last state must be the one that was sampled from, and the run is as long as it can be.

    Args:
        read: The pass.
        texts: All tokens of each request, as far as they are known; -1 where one is not.
        sampled: State of the last token of each, shape [requests, hidden].

    Returns:
        Ranges of places in the pass, one after another.

    Raises:
        ValueError: The pass is of other requests.
    """
    positions, token_ids, begin = read.positions.tolist(), read.token_ids.tolist(), 0
    runs: list[range] = []
    for text in texts:
        if begin < len(positions):
            runs.append(range(begin, _run_end(positions, token_ids, begin, text)))
            begin = runs[-1].stop
    if len(runs) == len(texts):
        lasts = torch.tensor([run[-1] for run in runs], device=sampled.device)
        if bool((read.hidden[lasts] == sampled).all()):
            return runs
    return _searched(read, texts, sampled)


def _searched(read: Pass, texts: Sequence[Sequence[int]], sampled: Tensor) -> list[range]:
    positions, token_ids, begin = read.positions.tolist(), read.token_ids.tolist(), 0
    found = []
    for text, state in zip(texts, sampled, strict=True):
        stop = _run_end(positions, token_ids, begin, text) if begin < len(positions) else begin
        equal = (read.hidden[begin:stop] == state).all(-1).nonzero()
        if not len(equal):
            raise ValueError(f"no state of the tokens from {begin} to {stop} was sampled from")
        found.append(range(begin, begin + int(equal[-1]) + 1))
        begin = found[-1].stop
    return found


def _run_end(
    positions: Sequence[int], token_ids: Sequence[int], begin: int, text: Sequence[int]
) -> int:
    """Where tokens end that follow each other in a text, at least one."""
    first, end = positions[begin], begin + 1
    while end < len(positions):
        place = first + end - begin
        if positions[end] != place or place >= len(text) or token_ids[end] != text[place]:
            break
        end += 1
    return end
