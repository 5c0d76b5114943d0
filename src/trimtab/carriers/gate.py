"""The gate: when a memory may speak, learnt from the source pair alone."""

import torch
from torch import Tensor

from trimtab.carriers.memory import CONTEXT_BYTES
from trimtab.carriers.search import Found

MIN_SPREAD = 0.05
"""A feature that varies less than this is not blown up: its weight would not transfer."""

GATE_FEATURES = (
    "one",
    "longest_match",
    "mean_match",
    "top_prob",
    "log_overlap",
    "entropy_nats",
    "top_logprob",
)


def gate_features(
    found: Found,
    values: Tensor,
    logprobs: Tensor,
    *,
    weights: Tensor | None = None,
    tail_entropy_nats: Tensor | None = None,
) -> Tensor:
    """What a gate can know before it opens, shape [questions, len(GATE_FEATURES)].

    All features are comparable between models and tokenizers: they are read from bytes, from
    shares, and from the steered model's own uncertainty, never from cosines, whose level differs
    from host to host.

    Args:
        found: What the memory found.
        values: Proposed tokens, -1 for none, shape [questions, proposals]; one a neighbour
            unless `weights` is given.
        logprobs: The steered model's log-probabilities, shape [questions, vocab].
        weights: How likely the memory finds each proposal, shape [questions, proposals].
        tail_entropy_nats: Where the last column stands for many tokens, the entropy of the model's
            distribution among these, shape [questions].
    """
    has_value = values >= 0
    proposed = logprobs.gather(1, values.clamp_min(0)).exp() * has_value
    weights = (found.weights if weights is None else weights) * has_value
    # Over the proposed tokens alone: a whole vocabulary would cost more than all else here.
    tokens, places = values.clamp_min(0).unique(return_inverse=True)
    dense = torch.zeros(len(values), len(tokens), dtype=weights.dtype)
    top_prob = dense.scatter_add(1, places, weights).amax(-1)
    probs = logprobs.exp()
    entropy = -(probs * logprobs.clamp_min(-1e4)).sum(-1)
    if tail_entropy_nats is not None:
        # The chain rule of entropy.
        entropy = entropy + probs[:, -1] * tail_entropy_nats
        logprobs = logprobs[:, :-1]
    matched = found.matched_bytes.float() / CONTEXT_BYTES
    return torch.stack(
        [
            torch.ones(len(values)),
            matched.amax(1),
            (found.weights * matched).sum(1),
            top_prob,
            ((weights * proposed).sum(1) + 1e-4).log(),
            entropy,
            logprobs.amax(-1),
        ],
        1,
    )


def gate_probs(features: Tensor, gate: Tensor | tuple[float, ...], shift: float = 0.0) -> Tensor:
    """How much of the prediction the memory makes, in (0, 1), shape [questions].

    Args:
        features: GATE_FEATURES, shape [questions, features].
        gate: Their weights, shape [features] or [questions, features].
        shift: Added to the log-odds.
    """
    log_odds = (features * torch.as_tensor(gate)).sum(-1) + shift
    return torch.sigmoid(log_odds).clamp(1e-6, 1 - 1e-6)


def fit_gate(
    features: Tensor,
    logprob: Tensor,
    memory_logprob: Tensor,
    weight: Tensor,
    *,
    decay: float = 1e-3,
) -> tuple[float, ...]:
    """Learn when the memory helps, from a model and text that need no host.

    Maximises the likelihood of (1 - g) p + g p_memory with g = sigmoid(w . features): a convex
    likelihood in each g, solved by L-BFGS. Features are standardised while fitting.

    Args:
        features: Shape [positions, features]; the first is constant one.
        logprob: The model's log-probability of what came next, shape [positions].
        memory_logprob: The memory's, -inf where it does not propose it, shape [positions].
        weight: How much each position counts, summing to one, shape [positions].
        decay: L2 penalty on the standardised weights.
    """
    mean, std = features.mean(0), features.std(0).clamp_min(MIN_SPREAD)
    mean[0], std[0] = 0.0, 1.0
    standard = (features - mean) / std
    weights = torch.zeros(features.shape[1])
    weights[0] = -3.0
    weights.requires_grad_()
    optimiser = torch.optim.LBFGS([weights], max_iter=300, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimiser.zero_grad()
        log_odds = standard @ weights
        closed = torch.nn.functional.logsigmoid(-log_odds)
        opened = torch.nn.functional.logsigmoid(log_odds)
        mixed = torch.logaddexp(logprob + closed, memory_logprob.clamp_min(-30) + opened)
        value = -(weight * mixed).sum() + decay * (weights[1:] ** 2).sum()
        value.backward()
        return value

    optimiser.step(loss)  # pyright: ignore[reportArgumentType]
    raw = weights.detach() / std
    raw[0] = weights.detach()[0] - (raw[1:] * mean[1:]).sum()
    return tuple(raw.tolist())
