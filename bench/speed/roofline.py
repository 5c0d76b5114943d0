"""What a token costs at least: bytes and operations that must be moved, and this machine's peaks.

A roofline (Williams et al. 2009): work takes at least its bytes over the memory's bandwidth, and at
least its operations over the peak of the matrix product. Decoding reads every weight of every model
that runs, once a pass, so that the number of passes is what counts; it is counted, not assumed.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from transformers import PreTrainedModel

from bench.speed.timing import timed
from trimtab.backends.int8 import Int8Linear

BANDWIDTH_BYTES, BANDWIDTH_COLUMNS = 2**29, 8_192
"""A matrix that fits no cache, times a vector: what decoding does."""

FLOPS_SIZE, GPU_FLOPS_SIZE, TRIES = 1_536, 8_192, 12


@dataclass(frozen=True)
class Peaks:
    """The fastest that this machine was seen to do, with the threads and the arithmetic in use.

    Attributes:
        bytes_per_sec: Of a matrix times a vector.
        flops_per_sec: Of a product of two matrices.
    """

    bytes_per_sec: float
    flops_per_sec: float

    @staticmethod
    def measured(dtype: torch.dtype) -> "Peaks":
        """Measure both where models run, some seconds."""
        rows = BANDWIDTH_BYTES // BANDWIDTH_COLUMNS // dtype.itemsize
        size, device = (
            (GPU_FLOPS_SIZE, "cuda") if torch.cuda.is_available() else (FLOPS_SIZE, "cpu")
        )
        # Random numbers: a product of ones takes less power, and so less time, on a GPU.
        with torch.device(device):
            matrix = torch.randn(rows, BANDWIDTH_COLUMNS).to(dtype)
            square = torch.randn(size, size).to(dtype)
            vector = torch.randn(BANDWIDTH_COLUMNS).to(dtype)
        return Peaks(
            matrix.nbytes / _fastest_sec(lambda: matrix @ vector),
            2 * size**3 / _fastest_sec(lambda: square @ square),
        )


def _fastest_sec(work: Callable[[], object]) -> float:
    """Of a few runs the fastest counts: other work on the machine can only slow one down."""
    with torch.no_grad():
        return min(timed(work) for _ in range(TRIES))


@dataclass(frozen=True)
class Work:
    """What must be moved and computed, for each unit of what is measured.

    Attributes:
        bytes: Read from memory.
        flops: A multiply and an add count as two.
    """

    bytes: float = 0.0
    flops: float = 0.0

    def __add__(self, other: "Work") -> "Work":
        """Both."""
        return Work(self.bytes + other.bytes, self.flops + other.flops)

    def times(self, factor: float) -> "Work":
        """So many times."""
        return Work(self.bytes * factor, self.flops * factor)

    def least_sec(self, peaks: Peaks) -> float:
        """Seconds that it takes at least."""
        return max(self.bytes / peaks.bytes_per_sec, self.flops / peaks.flops_per_sec)


@dataclass(frozen=True)
class Size:
    """What one pass of a model costs.

    Attributes:
        weight_bytes: Of the weights that a pass reads: all but an untied input embedding.
        weights: How many these are.
        cache_bytes: Keys and values of one token of context.
        attention_flops: Of one token that attends to one other.
    """

    weight_bytes: float
    weights: float
    cache_bytes: float
    attention_flops: float

    @staticmethod
    def of(model: PreTrainedModel, *, lora: bool = False, head: Int8Linear | None = None) -> "Size":
        """Count a model's weights.

        Args:
            model: Decoder-only.
            lora: Count the weights of a LoRA in it too, which else is switched off or merged.
            head: What its final states are multiplied by, if not what it has itself.
        """
        table: Any = model.get_input_embeddings()
        own: Any = model.get_output_embeddings()
        tied = head is None and (own is None or own.weight is table.weight)
        weights = [
            weight
            for name, weight in model.named_parameters()
            if (tied or weight is not table.weight) and (lora or "lora_" not in name)
        ]
        # Weights of one byte are buffers.
        small = [weight for weight in model.buffers() if weight.dtype is torch.int8]
        kept = [*weights, *small, *([] if head is None else [head.weight])]
        config: Any = model.config.get_text_config(decoder=True)
        heads, layers = config.num_attention_heads, config.num_hidden_layers
        width = getattr(config, "head_dim", None) or config.hidden_size // heads
        pairs = getattr(config, "num_key_value_heads", None) or heads
        return Size(
            float(sum(weight.nbytes for weight in kept)),
            float(sum(weight.numel() for weight in kept)),
            2.0 * layers * pairs * width * model.dtype.itemsize,
            4.0 * layers * heads * width,
        )

    def passes(self, passes: float, tokens: float, context: float) -> Work:
        """Work of some passes over so many tokens in all, each after so much context."""
        return Work(
            passes * (self.weight_bytes + context * self.cache_bytes),
            tokens * (2.0 * self.weights + context * self.attention_flops),
        )


@dataclass
class Passes:
    """What a model has read after the first new token of each prompt.

    Attributes:
        passes: How often it was run.
        tokens: Tokens that it read then.
    """

    passes: int = 0
    tokens: int = 0


@contextmanager
def counted(
    models: Mapping[str, PreTrainedModel], when: Callable[[], bool]
) -> Iterator[dict[str, Passes]]:
    """Count the passes of models inside the context.

    Args:
        models: By name; each is counted at its trunk, whoever calls it.
        when: Whether a pass counts; asked at each.
    """
    found = {name: Passes() for name in models}
    with ExitStack() as stack:
        for name, model in models.items():
            trunk: Any = model.base_model
            hook = partial(_count, found[name], when)
            stack.callback(trunk.register_forward_pre_hook(hook, with_kwargs=True).remove)
        yield found


def _count(
    found: Passes, when: Callable[[], bool], _module: Any, args: Any, given: dict[str, Any]
) -> None:
    ids = given.get("input_ids", *args[:1])
    if when() and ids is not None:
        found.passes += 1
        found.tokens += ids.numel()
