"""Small tokens followed one by one to the host tokens that they lead to.

`Alignment.to_host` carries whole distributions. Two cases need the strings: a small token that
repeats the end of the context, and one whose host tokens the small model itself tells apart.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from trimtab.align.candidates import Candidates
from trimtab.align.carry import Alignment
from trimtab.align.strings import Strings

FOLLOWED_TOKENS = 64
"""Likeliest small tokens that are followed one by one."""

FOLLOWED_SHARE = 1e-3
"""Tokens with a smaller share than this are not followed."""

LEAST_POSSIBLE = 1e-3
"""Where the tokenizer leaves less than this of what the small model says, the host says it."""

HOST_TOKENS = 256
"""Likeliest host tokens among which those are sought that a small token leads to."""

OTHERWISE = 0.05
"""Weight of a host token that agrees with a small one in bytes, but not by the tokenizers.

These are asked about the bytes alone, and what follows may change their answer: SmolLM2 reads `jun`
as one token, and `junktiv` as `j`, `unk`, `tiv`; Gemma reads `hern` as one token, and `hernie` as
`her`, `nie`. A host that is sure of such a token sees it coming.
"""

FORESEEN_PROB = 0.01
"""Least probability of such a token."""


class _Share(NamedTuple):
    """A probability, and the places of the candidates that it belongs to.

    Attributes:
        prob: The probability.
        places: Candidates that the tokenizers lead to.
        others: Candidates that they would have to read otherwise (`OTHERWISE`).
    """

    prob: float
    places: Sequence[int]
    others: Sequence[int] = ()


def rest_to_host(
    alignment: Alignment, probs: Tensor, rest: bytes, host_probs: Tensor, candidates: Candidates
) -> Tensor:
    """Carry a distribution where the next small token begins with `rest` and goes beyond it.

    Args:
        alignment: Of both vocabularies.
        probs: Over small tokens, shape [vocab of small].
        rest: Bytes of the context that the next token repeats.
        host_probs: The host's own over the candidates, shape [candidates].
        candidates: The candidates.

    Returns:
        Shape [candidates], given that the token goes beyond `rest`.
    """
    ids = alignment.small.longer_than(rest)
    total = float(probs[ids].sum())
    if total <= 0:
        return host_probs
    shares = list[_Share]()
    led_to = _led_to(alignment, rest, host_probs, candidates)
    foreseen = _foreseen(alignment, host_probs, candidates)
    for prob, place in _likeliest(probs[ids] / total):
        token_id = int(ids[place])
        suffix = alignment.small.bytes_of(token_id)[len(rest) :]
        # What the host does not expect may still be what the small model means.
        places = led_to.get(token_id) or _all_led_to(alignment, token_id, rest, suffix, candidates)
        if not places or float(host_probs[places].sum()) <= 0:
            first = candidates.first_of(suffix, alignment.host)
            places = [first] if first >= 0 else []
        shares.append(_Share(prob, places, _others(suffix, places, foreseen)))
    carried = _dealt_out(shares, host_probs)
    # What was not followed one by one, and the end of a text, are left to the host's own view.
    followed, foreign = float(carried.sum()), host_probs.clone()
    foreign[candidates.order] = 0.0
    going_on = 1.0 - float(foreign.sum())
    return foreign + going_on * carried + (1.0 - followed) * (host_probs - foreign)


def undecided(
    alignment: Alignment, token_id: int, host_probs: Tensor, candidates: Candidates
) -> float:
    """How unsure it is which of a host's tokens comes, given the small token that begins it.

    Args:
        alignment: Of both vocabularies.
        token_id: The small token.
        host_probs: The host's own over the candidates, shape [candidates].
        candidates: The candidates.

    Returns:
        One less the share of the likeliest that the tokenizers lead to; 0 where there is no other,
        and of tokens that stand for no text.
    """
    text = alignment.small.bytes_of(token_id)
    if not text:
        return 0.0
    places = alignment.begun_by(token_id, candidates).tolist()
    if alignment.is_cut[token_id]:
        # The host may begin it with a shorter token as well.
        first = candidates.first_of(text, alignment.host)
        places += [first] if first >= 0 else []
    own = host_probs[places]
    others = _others(text, places, _foreseen(alignment, host_probs, candidates))
    total = float(own.sum()) + OTHERWISE * float(host_probs[others].sum())
    return 1.0 - (float(own.max()) if len(own) else 0.0) / total if total > 0 else 0.0


def after_token(
    alignment: Alignment, token_id: int, probs: Tensor, host_probs: Tensor, candidates: Candidates
) -> Tensor:
    """Deal a small token out to host tokens as the small model says that the text goes on.

    A token u after t lends its probability to the candidates that its tokenizer begins with both,
    and to that with which the host begins to read both, in the host's proportions, and to those
    that a host sees coming (`OTHERWISE`). Tokens u with which the tokenizer would not have read t
    are left out. Those that are not followed leave their share to the host's view of what continues
    t, or, where nothing does, to the candidate with which the host begins t.

    Args:
        alignment: Of both vocabularies.
        token_id: The small token t.
        probs: Over the small tokens u that come next, shape [vocab of small].
        host_probs: The host's own over the candidates, shape [candidates].
        candidates: The candidates.

    Returns:
        Shares of the candidates, shape [candidates]; what is missing to one belongs to other
        tokens.
    """
    small = alignment.small
    lead = small.bytes_of(token_id)
    by_host = _by_host(alignment, token_id, host_probs, candidates)
    shares, followed, impossible = list[_Share](), 0.0, 0.0
    foreseen = _foreseen(alignment, host_probs, candidates)
    for prob, following in _likeliest(probs):
        followed += prob
        text = lead + small.bytes_of(following)
        if all(way[:1] != (token_id,) for way in small.ways_to_begin(text)):
            impossible += prob
            continue
        places = _going_on(small, (token_id, following), text, candidates)
        if (first := candidates.first_of(text, alignment.host)) >= 0:
            places = [*{*places, first}]
        # After the end of a text comes nothing that would change how a host reads it.
        others = _others(text, places, foreseen) if small.bytes_of(following) else []
        shares.append(_Share(prob, places, others))
    possible = 1.0 - impossible
    if possible < LEAST_POSSIBLE:
        return by_host
    return (_dealt_out(shares, host_probs) + max(1.0 - followed, 0.0) * by_host) / possible


def _by_host(
    alignment: Alignment, token_id: int, host_probs: Tensor, candidates: Candidates
) -> Tensor:
    """Shares of the candidates that a small token begins, or that begins it, as the host sees them.

    Zeros where there are none among the candidates.
    """
    begun = alignment.begun_by(token_id, candidates)
    own = host_probs[begun]
    found = torch.zeros_like(host_probs)
    found[begun] = own / own.sum().clamp_min(1e-30)
    if float(own.sum()) <= 0:
        first = candidates.first_of(alignment.small.bytes_of(token_id), alignment.host)
        found[[first] if first >= 0 else []] = 1.0
    return found


def _going_on(
    small: Strings, tokens: tuple[int, int], text: bytes, candidates: Candidates
) -> list[int]:
    """Places of the candidates that a small tokenizer may begin with two tokens, as spelled."""
    # The end of a text is no continuation that a longer host token could have.
    if not small.bytes_of(tokens[1]):
        return []
    return [
        int(candidates.order[place])
        for place in candidates.beginning_with(text)
        if tokens in small.ways_to_begin(candidates.texts[place])
    ]


def _foreseen(
    alignment: Alignment, host_probs: Tensor, candidates: Candidates
) -> list[tuple[bytes, int]]:
    """Texts and places of the candidates that a host is sure enough of to see more coming."""
    if not alignment.may_read_otherwise:
        return []
    likely = torch.nonzero(host_probs[candidates.order] >= FORESEEN_PROB)[:, 0].tolist()
    places = candidates.order[likely].tolist()
    return [(candidates.texts[i], place) for i, place in zip(likely, places, strict=True)]


def _others(text: bytes, places: Sequence[int], foreseen: Sequence[tuple[bytes, int]]) -> list[int]:
    """Places of those that begin with a text, or with which it begins, but for `places`."""
    return [
        place
        for own, place in foreseen
        if (own.startswith(text) or text.startswith(own)) and place not in places
    ]


def _likeliest(probs: Tensor) -> list[tuple[float, int]]:
    """Probabilities and places of those that are followed."""
    # Few are left to be sorted, of a vocabulary that takes long.
    near = torch.nonzero(probs >= FOLLOWED_SHARE)[:, 0]
    top = probs[near].topk(min(len(near), FOLLOWED_TOKENS))
    return list(zip(top.values.tolist(), near[top.indices].tolist(), strict=True))


def _dealt_out(shares: Sequence[_Share], host_probs: Tensor) -> Tensor:
    """Each share dealt out to its candidates as the host sees them: alike where it excludes all.

    Others have no more than half of a share where the host thinks the rest possible at all: what an
    expert knows and a host does not would be lost otherwise.

    Args:
        shares: Each share with its candidates' places; of none, nothing is dealt out.
        host_probs: The host's own over the candidates, shape [candidates], float on the CPU.
    """
    counts = torch.tensor([len(one.places) + len(one.others) for one in shares], dtype=torch.long)
    share = torch.arange(len(shares)).repeat_interleave(counts)
    within = torch.tensor([i for one in shares for i in (*one.places, *one.others)]).long()
    is_other = torch.tensor(
        [i in one.others for one in shares for i in (*one.places, *one.others)]
    ).bool()
    own = host_probs[within]
    none = own.new_zeros(len(shares))
    led_to = none.index_add(0, share, own * ~is_other)
    most = torch.where(led_to > 0, led_to, torch.inf)
    weights = (most / none.index_add(0, share, own * is_other)).clamp_max(OTHERWISE)
    own = torch.where(is_other, own * weights[share], own)
    total = none.index_add(0, share, own)[share]
    part = torch.where(total > 0, own / total, 1.0 / counts[share])
    probs = own.new_tensor([one.prob for one in shares])
    return torch.zeros_like(host_probs).index_add(0, within, probs[share] * part)


def _all_led_to(
    alignment: Alignment, token_id: int, rest: bytes, suffix: bytes, candidates: Candidates
) -> list[int]:
    """Places of all candidates that one small token leads to."""
    return [
        int(candidates.order[place])
        for place in candidates.beginning_with(suffix)
        if token_id in alignment.firsts_of(rest + candidates.texts[place])
    ]


def _led_to(
    alignment: Alignment, rest: bytes, host_probs: Tensor, candidates: Candidates
) -> dict[int, list[int]]:
    """Places of the likeliest candidates by the small tokens that begin with rest and them."""
    likely = host_probs[candidates.order].topk(min(len(candidates.order), HOST_TOKENS))
    led_to: dict[int, list[int]] = {}
    for place in likely.indices.tolist():
        for token_id in alignment.firsts_of(rest + candidates.texts[place]):
            led_to.setdefault(token_id, []).append(int(candidates.order[place]))
    return led_to
