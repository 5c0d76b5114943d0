"""What the scores of a test say beyond bits per byte: whole lines right, and calibration. Pure."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch

from trimtab.metrics import Estimate, draws
from trimtab.steering.kept import Kept

BINS = 15
"""Of the expected calibration error."""


def row_tasks(
    scored: Sequence[Kept],
    outcomes: Mapping[str, Mapping[str, Sequence[np.ndarray]]],
    *,
    seed: int = 0,
) -> Mapping[str, Mapping[str, Estimate]]:
    """Task figures by task and row.

    Those of `row_outcomes`, and `ece`: expected calibration error of the likeliest token (Guo et
    al. 2017), over BINS bins of equal width.

    Args:
        scored: Scores of the test documents.
        outcomes: What `row_outcomes` gave of them.
        seed: Seed of the bootstrap over documents.
    """
    rows = scored[0].on_host.rows if scored else {}
    sure = {row: [_sureness(kept, row) for kept in scored] for row in rows}
    shares = {
        task: {row: _resampled(found, _mean, seed) for row, found in by_row.items()}
        for task, by_row in outcomes.items()
    }
    calibration = {row: _resampled(found, calibration_error, seed) for row, found in sure.items()}
    return shares | {"ece": calibration}


def row_outcomes(
    scored: Sequence[Kept], token_bytes: Sequence[bytes | None]
) -> Mapping[str, Mapping[str, list[np.ndarray]]]:
    """What is right in each document, by task and row; arrays of shape [items, 1] of 0 and 1.

    `next-line`: lines of which every token is the likeliest one, given the true text before it
    (exact match, teacher-forced). `next-token`: tokens that are the likeliest one.

    Args:
        scored: Scores of the test documents.
        token_bytes: Of the host.
    """
    rows = scored[0].on_host.rows if scored else {}
    return {
        "next-line": {row: [_lines(kept, row, token_bytes) for kept in scored] for row in rows},
        "next-token": {row: [_sureness(kept, row)[:, 1:] for kept in scored] for row in rows},
    }


def _lines(kept: Kept, row: str, token_bytes: Sequence[bytes | None]) -> np.ndarray:
    """Whether each line but the first, of which only a part is scored, is right throughout."""
    right = (kept.on_host.rows[row].top_ids == torch.tensor(kept.on_host.token_ids)).tolist()
    lines, current = [], []
    for token_id, is_right in zip(kept.on_host.token_ids, right, strict=True):
        current.append(is_right)
        if b"\n" in (token_bytes[token_id] or b""):
            lines.append(all(current))
            current = []
    return np.array(lines[1:], dtype=float)[:, None]


def _sureness(kept: Kept, row: str) -> np.ndarray:
    """Probability of the likeliest token and whether it was right, shape [tokens, 2]."""
    score = kept.on_host.rows[row]
    right = score.top_ids == torch.tensor(kept.on_host.token_ids)
    return torch.stack([score.top_logprobs.double().exp(), right.double()], 1).numpy()


def _mean(items: np.ndarray) -> float:
    return float(items.mean()) if len(items) else 0.0


def calibration_error(items: np.ndarray) -> float:
    """Expected calibration error of probabilities and outcomes, shape [items, 2]; in [0, 1]."""
    place = np.minimum((items[:, 0] * BINS).astype(int), BINS - 1)
    gaps = [
        abs(float((items[place == b, 1] - items[place == b, 0]).sum())) for b in np.unique(place)
    ]
    return sum(gaps) / len(items)


def share_right(right: Sequence[bool], *, seed: int = 0, resamples: int = 1_000) -> Estimate:
    """Share of items that are right, and its standard error by bootstrap over the items."""
    items = np.array(right, float)
    drawn = draws(len(items), seed, resamples)
    return Estimate(float(items.mean()), float(items[drawn].mean(1).std()))


def _resampled(
    documents: Sequence[np.ndarray],
    figure: Callable[[np.ndarray], float],
    seed: int,
    resamples: int = 200,
) -> Estimate:
    """A figure over all items, and its standard error by bootstrap over documents."""
    chosen = draws(len(documents), seed, resamples)
    found = [figure(np.concatenate([documents[i] for i in sample])) for sample in chosen]
    return Estimate(figure(np.concatenate(documents)), float(np.std(found)))
