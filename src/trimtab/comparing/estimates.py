"""What a method's steps are predicted to take, from the throughput that was measured here."""

from trimtab.comparing import sizes
from trimtab.comparing.bench import ADAPTER, LABEL_ADAPTER, Bench
from trimtab.comparing.measure import held_bytes
from trimtab.comparing.values import Step
from trimtab.costing.sheet import Shape, read_sheet


def lora(bench: Bench, shape: Shape, name: str) -> Step:
    """LoRA on the training text; what is done already is what it took."""
    window, rank = bench.config.train_window_tokens, bench.config.rank
    needed = sizes.lora_flops(shape, bench.lora_tokens, window, rank)
    return _trained(
        bench, f"tune {name}", needed, sizes.lora_bytes(shape, rank, window, bench.copy_bytes)
    )


def full(bench: Bench) -> Step:
    """All weights of the host."""
    shape, window = bench.host_shape, bench.config.train_window_tokens
    needed = sizes.full_flops(shape, bench.train_tokens, window)
    return _trained(bench, "tune full", needed, sizes.full_bytes(shape, window, bench.copy_bytes))


def qlora(bench: Bench) -> Step:
    """LoRA over 4-bit weights, as much slower as the price sheet says."""
    shape, window, rank = bench.host_shape, bench.config.train_window_tokens, bench.config.rank
    needed = sizes.lora_flops(shape, bench.lora_tokens, window, rank)
    held = sizes.qlora_bytes(shape, rank, window, bench.copy_bytes)
    step = _trained(bench, "tune qlora", needed, held)
    if not step.is_estimated:
        return step
    slower = read_sheet().factor("qlora_slowdown").middle
    return step.model_copy(update={"sec": step.sec * slower})


def expert(bench: Bench) -> tuple[Step, ...]:
    """The small model's tuning."""
    step = lora(bench, bench.small_shape, "expert")
    return (step.model_copy(update={"serves_all_hosts": True}),)


def recorded(bench: Bench) -> tuple[Step, ...]:
    """Tuning the small model and recording it."""
    needed = sizes.reading_flops(bench.small_shape, bench.read_tokens, 512)
    return (*expert(bench), _read(bench, "record", needed, serves_all_hosts=True))


def adapter(bench: Bench) -> tuple[Step, ...]:
    """Head and memory, seated on the host; of the fit the head alone is counted."""
    fit = _read(bench, f"fit {ADAPTER}", bench.fit_flops(), serves_all_hosts=True)
    return (*recorded(bench), fit, _read(bench, f"mount {ADAPTER}", bench.mount_flops))


def label_head(bench: Bench) -> tuple[Step, ...]:
    """The control: a recording, and a head that is fitted on the host's states."""
    fit = _read(bench, f"fit {LABEL_ADAPTER}", bench.fit_flops(labels=True))
    return (*recorded(bench), fit)


def _trained(bench: Bench, name: str, needed: float, held: float) -> Step:
    sec = bench.budget.training_sec(needed)
    return bench.done(name) or Step(
        name=name, flops=needed, sec=sec, peak_bytes=held_bytes() + int(held), is_estimated=True
    )


def _read(bench: Bench, name: str, needed: float, *, serves_all_hosts: bool = False) -> Step:
    return bench.done(name) or Step(
        name=name,
        flops=needed,
        sec=bench.budget.reading_sec(needed),
        is_estimated=True,
        serves_all_hosts=serves_all_hosts,
    )
