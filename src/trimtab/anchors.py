"""Anchors: token strings that two models share, and the closed-form map between their states.

The vocabulary is the coordinate system that all models share; see docs/method.md. Pure.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trimtab.unembedding import Unembedding
from trimtab.vocab import Vocabulary

UNSEEN_COUNT = 0.05
"""Count given to token strings that the recording never saw, so that each has some say."""


@dataclass(frozen=True)
class Anchors:
    """Token strings of the small model with their unembedding rows.

    Attributes:
        strings: Bytes of each token.
        rows: Unembedding rows times the logit scale, shape [anchors, hidden].
        weights: Token frequencies, positive, shape [anchors].
    """

    strings: tuple[bytes, ...]
    rows: Tensor
    weights: Tensor


@dataclass(frozen=True)
class StateMap:
    """A linear map from a host's hidden state to the small model's, up to a constant.

    Attributes:
        matrix: Shape [hidden of small, hidden of host].
        r_squared: Share of the host rows' weighted variance over the anchors that the small
            model's rows explain, at most 1.
        shared_tokens: Number of anchors that both models have.
    """

    matrix: Tensor
    r_squared: float
    shared_tokens: int


def choose_anchors(
    vocabulary: Vocabulary, unembedding: Unembedding, counts: Tensor, limit: int
) -> Anchors:
    """Take the most frequent token strings of the small model.

    Tokens that the recording never saw follow by id: in byte-pair vocabularies low ids were
    merged early, hence are frequent.

    Args:
        vocabulary: Of the small model.
        unembedding: Of the small model.
        counts: How often the recording saw each token, shape [vocab].
        limit: Number of anchors at most.
    """
    first = torch.full((len(vocabulary),), False)
    first[list(vocabulary.ids_by_bytes.values())] = True
    order = torch.argsort(counts, descending=True, stable=True)
    ids = order[first[order]][:limit]
    strings = tuple(vocabulary.token_bytes[i] or b"" for i in ids.tolist())
    rows = unembedding.weight[ids].detach().float() * unembedding.scale
    return Anchors(strings, rows, counts[ids].float() + UNSEEN_COUNT)


def pair_anchors(strings: Sequence[bytes], host: Vocabulary) -> tuple[Tensor, Tensor]:
    """Find the strings that a host has as one token.

    Returns:
        Indices into `strings` and the host's token ids, both of shape [shared].
    """
    pairs = [(i, host.ids_by_bytes[s]) for i, s in enumerate(strings) if s in host.ids_by_bytes]
    both = torch.tensor(pairs, dtype=torch.long).reshape(-1, 2)
    return both[:, 0], both[:, 1]


def fit_map(rows: Tensor, host_rows: Tensor, weights: Tensor, *, ridge: float) -> StateMap:
    """Solve for the map whose states give the anchors the host's logits.

    M = (A' L A + lambda I)^-1 A' L B with A, B the centred rows and L the frequency weights: the
    least-squares solution of A M = B. Then A M h = B h, so M h is the small state that would give
    the anchors the logits that the host gives. Rows are centred since softmax ignores a constant;
    without frequency weights the fit would be ruled by rows that training never touched.

    Args:
        rows: The small model's rows, shape [shared, hidden of small].
        host_rows: The host's rows of the same strings, shape [shared, hidden of host].
        weights: Token frequencies, shape [shared].
        ridge: lambda as a share of the mean diagonal of A' L A.
    """
    share = weights / weights.sum()
    small = rows - share @ rows
    host = host_rows - share @ host_rows
    weighted = share[:, None] * small
    gram, shared = weighted.T @ small, weighted.T @ host
    ridged = gram + torch.diag_embed((ridge * gram.diagonal().mean()).expand(len(gram)))
    matrix = torch.linalg.solve(ridged, shared)
    # tr M'A'LB + tr M'(A'LB - A'LA M): what is left of B would be as large as B itself.
    explained = float((matrix * (2 * shared - gram @ matrix)).sum())
    total = float(share @ host.square().sum(1))
    return StateMap(matrix, explained / total, len(rows))


@dataclass(frozen=True)
class Reading:
    """Features of the small model's state, read linearly from a host's state.

    Attributes:
        matrix: Shape [features, hidden of host].
        bias: Shape [features].
    """

    matrix: Tensor
    bias: Tensor

    def __call__(self, hidden: Tensor) -> Tensor:
        """Features in float32, shape [..., features], of states [..., hidden of host]."""
        return hidden.float() @ self.matrix.T + self.bias


def moment_matched(
    state_map: StateMap, small_mean: Tensor, small_std: Tensor, host_states: Tensor
) -> Reading:
    """Give mapped states the small model's means and standard deviations on the probe text.

    h ~ small_mean + S (M h_host - mean of M h_host), with S the ratios of deviations.

    Args:
        state_map: M.
        small_mean: Shape [hidden of small].
        small_std: Shape [hidden of small].
        host_states: The host's states on the probe text, shape [positions, hidden of host].
    """
    mapped = host_states.float() @ state_map.matrix.T
    scale = small_std / mapped.std(0).clamp_min(1e-6)
    matrix = scale[:, None] * state_map.matrix
    return Reading(matrix, small_mean - scale * mapped.mean(0))


def compose(features: Tensor, offset: Tensor, reading: Reading) -> Reading:
    """Read features @ (h - offset) where `reading` gives h, shapes [features, hidden], [hidden]."""
    return Reading(features @ reading.matrix, features @ (reading.bias - offset))
