"""How much of what is carried depends on which host tokens are candidates."""

import torch
from torch import Tensor

from trimtab.align.carry import LEAST_PROB, Alignment


def most_ignored(
    alignment: Alignment, probs: Tensor, host_probs: Tensor, token_ids: Tensor
) -> Tensor:
    """A bound on what `Alignment.to_host` ignores where only some host tokens are candidates.

    Carried over all tokens of the host and over the candidates, the distributions differ in total
    variation by no more than this: by what the host gives to tokens outside that no small token
    leads to, and by p(t) (1 - m(t) / M(t)) of each small token t, where M(t) is what the host
    gives to all its tokens that t begins, and m(t) to the candidates among them. Where t begins
    none of either, or is no host token and may so be read as a shorter one, all of t counts unless
    that one is a candidate, too. It needs the host's whole distribution, and no second question.

    Args:
        alignment: Of both vocabularies.
        probs: Over small tokens, shape [positions, vocab of small].
        host_probs: The host's own over all its tokens, shape [positions, vocab of host].
        token_ids: The candidates, shape [candidates].

    Returns:
        At most 1, shape [positions].
    """
    inside = torch.zeros(len(alignment.host.vocabulary), dtype=torch.bool)
    inside[token_ids] = True
    whole, held = _begun(alignment, host_probs), _begun(alignment, host_probs * inside)
    outside = (whole - held) / whole.clamp_min(1e-30)
    # What may be read as a shorter token moves there where longer ones are left out.
    outside = torch.where(alignment.is_cut & (held < whole), 1.0, outside)
    taker = alignment.first_host(torch.arange(whole.shape[1]))
    is_lost = (taker < 0) | ~inside[taker.clamp_min(0)]
    outside = torch.where(((whole <= 0) | alignment.is_cut) & is_lost, 1.0, outside)
    foreign = host_probs * alignment.is_foreign
    going_on = 1.0 - (foreign * inside).sum(-1, keepdim=True)
    text = probs * alignment.is_text
    text = going_on * text / text.sum(-1, keepdim=True).clamp_min(1e-30)
    # What is too unlikely to be followed may be followed all the same if it begins a candidate.
    outside = torch.where(text < LEAST_PROB, 1.0, outside)
    return ((text * outside).sum(-1) + (foreign * ~inside).sum(-1)).clamp_max(1.0)


def _begun(alignment: Alignment, host_probs: Tensor) -> Tensor:
    """What the host gives to the tokens that each small one begins, [positions, vocab of small]."""
    every = torch.arange(len(alignment.host.vocabulary))
    sums = host_probs.new_zeros(len(host_probs), len(alignment.small.vocabulary))
    for first in (alignment.first_small(every), alignment.other_small(every)):
        sums.index_add_(-1, first.clamp_min(0), host_probs * (first >= 0))
    return sums
