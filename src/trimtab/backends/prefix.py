"""How far two sequences of tokens begin alike."""

from collections.abc import Sequence


def common_length(ours: Sequence[int | None], theirs: Sequence[int | None]) -> int:
    """How many tokens two sequences begin alike with; at most the shorter one's number."""
    shorter = min(len(ours), len(theirs))
    # Most often one goes on from the other, and this compares without a step for each token.
    if list(ours[:shorter]) == list(theirs[:shorter]):
        return shorter
    pairs = zip(ours, theirs, strict=False)
    return next(place for place, (one, other) in enumerate(pairs) if one != other)
