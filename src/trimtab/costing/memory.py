"""Memory that training and serving take, and the accelerators that it makes necessary. Pure."""

import math
from dataclasses import dataclass

from trimtab.costing.flops import lora_params
from trimtab.costing.ranges import Range
from trimtab.costing.sheet import Gpu, Shape

GPUS_IN_A_MACHINE = 8
BF16_BYTES = 2
NF4_BYTES = 4.127 / 8
"""A weight in 4-bit NormalFloat with doubly quantised constants: 0.127 bits of them for each
(Dettmers et al. 2023, arXiv 2305.14314, section 3)."""
ADAM_BYTES = 16
"""A trained weight, its gradient and its Adam state in mixed precision: 2 + 2 + 12 (Rajbhandari et
al. 2020, ZeRO, arXiv 1910.02054, section 3.1)."""


def full_state_bytes(shape: Shape, bytes_per_param: Range) -> Range:
    """Weights, gradients and optimiser state of full fine-tuning, over all accelerators."""
    return bytes_per_param.times(shape.params)


def lora_state_bytes(shape: Shape, rank: int) -> float:
    """Frozen weights in 16 bits, and weights, gradients and optimiser state of a LoRA."""
    return BF16_BYTES * shape.params + ADAM_BYTES * lora_params(shape, rank)


def qlora_state_bytes(shape: Shape, rank: int) -> float:
    """The same with the linear layers in 4 bits; embedding and head stay in 16."""
    tables = (1 if shape.tied else 2) * shape.vocab * shape.hidden
    frozen = NF4_BYTES * max(shape.params - tables, 0) + BF16_BYTES * min(tables, shape.params)
    return frozen + ADAM_BYTES * lora_params(shape, rank)


def activation_bytes(shape: Shape, window_tokens: int) -> float:
    """Activations on each accelerator for one window, with a checkpoint before every layer.

    Each layer keeps its input, 2 bytes * window * hidden; one layer at a time is whole, 34 bytes *
    window * hidden without attention scores, which fused attention never stores (Korthikanti et
    al. 2022, arXiv 2205.05198, sections 4.1 and 5); logits and their gradient take 2 + 4 bytes.
    """
    inputs = 2.0 * shape.layers * window_tokens * shape.hidden
    layer = 34.0 * window_tokens * shape.hidden
    return inputs + layer + 6.0 * window_tokens * shape.vocab


def gathered_bytes(shape: Shape) -> float:
    """Two whole layers in 16 bits: what fully sharded training gathers, one ahead of the other."""
    return 2.0 * BF16_BYTES * shape.params / shape.layers


def gpus_for_training(state_bytes: float, shape: Shape, window_tokens: int, gpu: Gpu) -> int | None:
    """Fewest accelerators whose memory holds a training, fully sharded.

    Args:
        state_bytes: Over all accelerators.
        shape: Sizes of the model.
        window_tokens: Length of the window on each accelerator.
        gpu: The accelerator; a tenth of its memory is left to buffers and fragmentation.

    Returns:
        1, 2, 4 or a multiple of 8, as machines have them; None if what every accelerator needs for
        itself does not fit.
    """
    alone = activation_bytes(shape, window_tokens)
    if state_bytes + alone <= 0.9 * gpu.memory_bytes:
        return 1
    free = 0.9 * gpu.memory_bytes - alone - gathered_bytes(shape)
    return None if free <= 0 else whole_machines(math.ceil(state_bytes / free))


def whole_machines(gpus: int) -> int:
    """Round up to a number of accelerators that can be rented together: 1, 2, 4, 8, 16, 24..."""
    if gpus <= GPUS_IN_A_MACHINE:
        return 1 << (max(gpus, 1) - 1).bit_length()
    return math.ceil(gpus / GPUS_IN_A_MACHINE) * GPUS_IN_A_MACHINE


def cache_bytes(shape: Shape) -> float:
    """Keys and values of one token, 16 bits."""
    return 2.0 * BF16_BYTES * shape.layers * shape.key_value


@dataclass(frozen=True)
class Load:
    """What a serving machine does at once.

    Attributes:
        requests: Requests that are answered together.
        context_tokens: Tokens that each of them holds.
    """

    requests: int
    context_tokens: float


def serving_bytes(shape: Shape, load: Load) -> float:
    """16-bit weights and the cache of all requests."""
    cache = load.requests * load.context_tokens * cache_bytes(shape)
    return BF16_BYTES * shape.params + cache


def gpus_for_serving(held_bytes: float, gpu: Gpu) -> int:
    """Fewest accelerators that hold so many bytes, 1, 2, 4 or a multiple of 8."""
    return whole_machines(math.ceil(held_bytes / (0.9 * gpu.memory_bytes)))
