"""BLEU and chrF of translations, with standard errors by a paired bootstrap over sentences."""

import random
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from trimtab.errors import InputError

RESAMPLES = 200


def signatures() -> dict[str, str]:
    """What exactly is computed, as sacrebleu writes it."""
    metrics = _metrics()
    for metric in metrics.values():
        # It names the number of references, which a metric knows once it has scored some.
        metric.corpus_score([""], [[""]])
    return {name: str(metric.get_signature()) for name, metric in metrics.items()}


def score(rows: Mapping[str, Sequence[str]], references: Sequence[str], seed: int) -> Any:
    """Score every row and its change against the row `host`.

    All rows are resampled together, so that what sentences have in common cancels.

    Args:
        rows: Translations by row, `host` among them, in the order of the references.
        references: One a sentence.
        seed: Of the resampling.

    Returns:
        By row and metric: mean and stderr, and for other rows change and change_stderr.
    """
    found: dict[str, Any] = {row: {} for row in rows}
    draws = [_draw(len(references), seed + n) for n in range(RESAMPLES)]
    for name, metric in _metrics().items():
        sampled = {
            row: [_of(metric, texts, references, draw) for draw in draws]
            for row, texts in rows.items()
        }
        whole = {row: _of(metric, texts, references, None) for row, texts in rows.items()}
        for row in rows:
            entry = {"mean": whole[row], "stderr": statistics.stdev(sampled[row])}
            if row != "host":
                pairs = zip(sampled[row], sampled["host"], strict=True)
                entry["change"] = whole[row] - whole["host"]
                entry["change_stderr"] = statistics.stdev(ours - host for ours, host in pairs)
            found[row][name] = {key: round(value, 3) for key, value in entry.items()}
    return found


def _draw(count: int, seed: int) -> list[int]:
    chosen = random.Random(seed)
    return [chosen.randrange(count) for _ in range(count)]


def _of(
    metric: Any, texts: Sequence[str], references: Sequence[str], draw: Sequence[int] | None
) -> float:
    places = range(len(texts)) if draw is None else draw
    picked = [[side[i] for i in places] for side in (texts, references)]
    return float(metric.corpus_score(picked[0], [picked[1]]).score)


def _metrics() -> dict[str, Any]:
    try:
        from sacrebleu.metrics.bleu import BLEU
        from sacrebleu.metrics.chrf import CHRF
    except ImportError as error:
        raise InputError(
            "translations are scored with sacrebleu, which is not installed",
            hint="pip install 'trimtab[translation]'",
        ) from error
    return {"bleu": BLEU(), "chrf": CHRF()}
