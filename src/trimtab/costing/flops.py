"""Floating-point operations of training and using a transformer. Pure.

A multiply and an add count as two. Only matrix products are counted, as in Kaplan et al. 2020
(arXiv 2001.08361, section 2.1) and PaLM's appendix B (arXiv 2204.02311): norms, activations and
softmax are a percent of the rest. Recomputation is not counted either: model FLOPs utilisation,
by which these numbers are divided, is defined on what the model needs, not on what is computed.
"""

from dataclasses import dataclass

from trimtab.costing.sheet import Shape

HEAD_BATCH_POSITIONS = 512
"""Positions in one step of a head's fit (`fitting/head.py`)."""


def forward_flops(shape: Shape, attended_tokens: float) -> float:
    """Operations of one token's forward pass: 2 for each weight, and attention.

    A query meets `attended_tokens` keys and as many values, 2 operations each for every feature of
    every head: 4 * layers * attention * attended. In causal attention over a window of s tokens,
    a token attends to s / 2 others on average; PaLM counts all s.

    Args:
        shape: Sizes of the model.
        attended_tokens: Earlier tokens that it attends to, on average.
    """
    attention = 4.0 * shape.layers * shape.attention * attended_tokens
    return 2.0 * shape.matmul_params + attention


def hidden_flops(shape: Shape, attended_tokens: float) -> float:
    """Operations of one token's forward pass up to the hidden state, without the head.

    That is what record, mount and host-fit compute: logits follow from hidden states.
    """
    return forward_flops(shape, attended_tokens) - 2.0 * shape.vocab * shape.hidden


def full_training_flops(shape: Shape, attended_tokens: float) -> float:
    """Operations to train one token with all weights: 3 forward passes.

    The backward pass multiplies each weight twice, once for the gradient of the weights and once
    for that of the inputs: 6 N a token (Kaplan et al. 2020, section 2.1).
    """
    return 3.0 * forward_flops(shape, attended_tokens)


def lora_params(shape: Shape, rank: int) -> float:
    """Weights of a LoRA on all linear layers of the blocks: rank * (inputs + outputs) each.

    Hu et al. 2021 (arXiv 2106.09685, section 4.1); the layers are PEFT's `all-linear`, which leaves
    the head out.
    """
    hidden, attention = shape.hidden, shape.attention
    sides = (
        *((hidden, attention), (hidden, shape.key_value), (hidden, shape.key_value)),
        *((attention, hidden), (hidden, shape.feed_forward), (hidden, shape.feed_forward)),
        (shape.feed_forward, hidden),
    )
    return float(shape.layers * rank * sum(inputs + outputs for inputs, outputs in sides))


def lora_training_flops(shape: Shape, attended_tokens: float, rank: int) -> float:
    """Operations to train one token with LoRA: 2 forward passes, and 6 for each LoRA weight.

    Frozen weights need no gradient of their own, but the gradient still flows through them: 4 N a
    token where full training has 6 N. So LoRA saves a third of the computation, and nearly all of
    the optimiser's memory. (Attention has no weights: its backward pass is whole in both, one
    forward's worth is added for it.)
    """
    attention = forward_flops(shape, attended_tokens) - forward_flops(shape, 0)
    return 2.0 * forward_flops(shape, attended_tokens) + attention + 6.0 * lora_params(shape, rank)


COMPARED = 2_048
"""Tokens that a step of a head's fit compares."""

ACTIVE = 8_192
"""The same where the head is fitted on a host, to soft targets or labels."""


@dataclass(frozen=True)
class HeadFit:
    """What a head is fitted on (`FitConfig`).

    Attributes:
        positions: Recorded positions, domain and general.
        hidden: Width of the states that the head reads.
        compared: Tokens that a step compares.
        rank: Rank of the head.
        epochs: Passes over the positions.
    """

    positions: float
    hidden: int
    compared: int = COMPARED
    rank: int = 64
    epochs: int = 6


def head_fit_flops(fit: HeadFit) -> float:
    """Operations of fitting a head (`fitting/head.py`), over all positions and epochs.

    A position costs two sets of logits over the tokens that are compared (what is shifted, and the
    expert's), 2 * hidden * compared each; its state's way through `down`, forward and back,
    4 * hidden * rank; and the shift with the gradients of both its sides, 6 * rank * compared. A
    step adds rows @ up and rows @ offset, forward and back.
    """
    hidden, compared, rank = fit.hidden, fit.compared, fit.rank
    position = 4.0 * hidden * compared + 4.0 * hidden * rank + 6.0 * rank * compared
    step = 4.0 * compared * hidden * (rank + 1)
    return fit.epochs * fit.positions * (position + step / HEAD_BATCH_POSITIONS)


@dataclass(frozen=True)
class MemoryFit:
    """What a memory is made from (`FitConfig`).

    Attributes:
        entries: Recorded positions of the training text.
        asked: Positions that the gates are learnt on, of held-out and general text.
        key_size: Features of a key.
    """

    entries: float
    asked: float
    key_size: int = 192


def memory_fit_flops(fit: MemoryFit, shape: Shape) -> float:
    """Operations of making a memory and learning its gates (`fitting/memory.py`).

    Whitening takes 2 hidden^2 an entry, its key 2 * hidden * key_size. Each position that the gates
    are learnt on costs the reference's logits, and two searches by state
    (`memory_search_flops`).
    """
    hidden = shape.hidden
    entry = 2.0 * hidden**2 + 2.0 * hidden * fit.key_size
    search = 2.0 * hidden * fit.key_size + memory_search_flops(fit.entries, fit.key_size)
    return fit.entries * entry + fit.asked * (2.0 * hidden * shape.vocab + 2.0 * search)


LISTED_ENTRIES, PROBED_SHARE = 131_072, 8
"""As `carriers/search.py` has them, which this module does not load."""


def memory_search_flops(entries: float, key_size: int = 192) -> float:
    """Operations of one search by state: an inner product with every key.

    Of a large memory with the centre of every list, about sqrt(entries), and with the keys of one
    list in PROBED_SHARE.
    """
    if entries < LISTED_ENTRIES:
        return 2.0 * entries * key_size
    return 2.0 * (entries**0.5 + entries / PROBED_SHARE) * key_size


def map_flops(anchors: float, small: Shape, host: Shape, probe_tokens: float) -> float:
    """Operations of the closed-form map and its calibration.

    A' L A and A' L B over the anchors, the solution of the first with the second (Cholesky and two
    triangular solves), and a ridge regression of the small model's features on the host's states.
    """
    a, b = small.hidden, host.hidden
    products = 2.0 * anchors * a * (a + b)
    solution = a**3 / 3.0 + 2.0 * a**2 * b
    ridge = 2.0 * probe_tokens * b * (b + a) + b**3 / 3.0 + 2.0 * b**2 * a
    return products + solution + ridge


def head_use_flops(host: Shape, rank: int = 64) -> float:
    """Operations that a mounted head adds to a token: host state to rank, rank to all tokens."""
    return 2.0 * rank * (host.hidden + host.vocab)
