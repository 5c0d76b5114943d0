"""What one request costs: the time of prefill and decoding, by a roofline. Pure.

Reading a prompt is bound by computation. Writing an answer reads all weights once a token, for all
requests together, and every request's cache: it is bound by memory bandwidth until so many requests
are answered together that computation takes longer (Williams et al. 2009, roofline; Pope et al.
2022, arXiv 2211.05102, section 2).
"""

from dataclasses import dataclass

from trimtab.costing.flops import forward_flops
from trimtab.costing.memory import BF16_BYTES, Load, cache_bytes
from trimtab.costing.ranges import Range
from trimtab.costing.sheet import Gpu, Shape


@dataclass(frozen=True)
class Server:
    """Accelerators that answer requests.

    Attributes:
        gpu: Which.
        gpus: How many.
        prefill_utilisation: Share of the peak operations that reading a prompt reaches.
        bandwidth_utilisation: Share of the peak bandwidth that writing an answer reaches.
    """

    gpu: Gpu
    gpus: int
    prefill_utilisation: Range
    bandwidth_utilisation: Range


def prefill_sec(shape: Shape, tokens: float, server: Server) -> Range:
    """Seconds of the whole server to read a prompt."""
    flops = tokens * forward_flops(shape, tokens / 2)
    peak = server.gpus * server.gpu.bf16_flops
    return Range.exactly(flops / peak).over(server.prefill_utilisation)


def decode_sec(shape: Shape, load: Load, server: Server, passes: float = 1) -> Range:
    """Seconds of the whole server for one more token of one request, of those answered together.

    Args:
        shape: Sizes of the model.
        load: Requests and their contexts.
        server: The machine.
        passes: How often the weights are read for a token; caches are read as often.
    """
    cache = load.requests * load.context_tokens * cache_bytes(shape)
    moved = passes * (BF16_BYTES * shape.params + cache)
    flops = passes * load.requests * forward_flops(shape, load.context_tokens)
    reading = moved / (server.gpus * server.gpu.bandwidth)
    computing = flops / (server.gpus * server.gpu.bf16_flops)
    low = max(
        reading / server.bandwidth_utilisation.high, computing / server.prefill_utilisation.high
    )
    high = max(
        reading / server.bandwidth_utilisation.low, computing / server.prefill_utilisation.low
    )
    return Range(low, high).over(load.requests)


def usd(sec: Range, gpus: float, usd_per_hour: Range) -> Range:
    """Price of so many seconds of so many accelerators."""
    return sec.times(usd_per_hour).times(gpus / 3600)
