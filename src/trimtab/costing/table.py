"""The cost table as a terminal shows it, with its assumptions below. Pure."""

from collections.abc import Sequence

from trimtab.costing.methods import Estimate
from trimtab.costing.ranges import Range
from trimtab.costing.steps import Question

NONE = "-"
HEAD = (
    *("method", "GPUs", "GPU-hours", "hours", "$ one host", "$ all hosts"),
    *("another host", "$ request", "$ 1M answer tokens"),
)


def number(value: float) -> str:
    """Two significant digits, as people write them: 0.0004, 1.6, 250, 18,000, 3.1e11."""
    if value == 0:
        return "0"
    rounded = float(f"{value:.2g}")
    if not 1e-4 <= rounded < 1e6:
        digits, _, power = f"{rounded:.1e}".partition("e")
        return f"{digits.removesuffix('.0')}e{int(power)}"
    if rounded >= 100:
        return f"{rounded:,.0f}"
    return f"{rounded:.10f}".rstrip("0").rstrip(".")


def shown(value: Range | None) -> str:
    """A range, or its one value where the bounds look the same."""
    if value is None:
        return "do not fit"
    low, high = number(value.low), number(value.high)
    return low if low == high else f"{low}-{high}"


def cells(estimate: Estimate, hosts: int) -> tuple[str, ...]:
    """What the table shows of an estimate."""
    work = (shown(estimate.gpus), shown(estimate.gpu_hours), shown(estimate.hours))
    money = (shown(estimate.usd_once + estimate.usd_per_host), shown(estimate.usd))
    if not estimate.work:
        work = (NONE,) * 3
    elif estimate.gpus is None:
        # Hours of a training that no number of these accelerators can hold would mean nothing.
        work, money = (shown(None), NONE, NONE), (NONE, NONE)
    return (
        estimate.method,
        *work,
        money[0],
        money[1] if hosts > 1 else "",
        estimate.further_hosts,
        shown(estimate.request.usd),
        shown(estimate.usd_per_million_answer_tokens),
    )


def table(question: Question, rows: Sequence[Estimate]) -> str:
    """Aligned columns; the one for all hosts only where there are several."""
    lines = [HEAD, *(cells(row, question.config.hosts) for row in rows)]
    kept = [i for i in range(len(HEAD)) if question.config.hosts > 1 or i != 5]
    widths = [max(len(line[i]) for line in lines) for i in kept]
    return "\n".join(
        "  ".join(
            line[i].ljust(width) if i in (0, 6) else line[i].rjust(width)
            for i, width in zip(kept, widths, strict=True)
        ).rstrip()
        for line in lines
    )


def assumptions(question: Question) -> list[str]:
    """What the table takes for granted, one statement each."""
    config, sheet, gpu = question.config, question.sheet, question.gpu
    price = question.usd_per_hour
    factor = {name: shown(entry.range) for name, entry in sheet.factors.items()}
    listed = " (given)" if config.price is not None else f" (listed, sheet of {sheet.date})"
    passes = "1 pass" if config.epochs == 1 else f"{config.epochs} passes"
    sizes = (("host", question.host), ("small model", question.small))
    named = "; ".join(f"{who} {number(s.params / 1e9)}B like {s.name}" for who, s in sizes)
    return [
        f"shapes: {named}",
        f"{gpu.title}: {gpu.bf16_flops / 1e12:.0f} TFLOP/s dense BF16,"
        f" {gpu.memory_bytes / 1e9:.0f} GB, ${shown(price)} an hour{listed}",
        f"training: {number(config.tokens / 1e6)}M tokens, {passes}, windows of"
        f" {config.window_tokens}, {100 * config.utilisation_low:.0f} to"
        f" {100 * config.utilisation_high:.0f} % of the peak; one run that succeeds",
        f"LoRA of rank {config.lora_rank} on all linear layers; QLoRA takes"
        f" {factor['qlora_slowdown']} times LoRA's hours",
        "Trimtab: the small model is tuned by LoRA; fit uses"
        f" {number(question.fit_tokens / 1e6)}M tokens,"
        f" on processor cores of {shown(sheet.factor('cpu_flops').times(1e-12))} TFLOP/s beside a"
        " paid GPU, as the memory's search does",
        f"requests: {config.question_tokens} tokens in, {config.answer_tokens} out,"
        f" {config.requests_at_once} at once; 16-bit weights; a full server",
        "not counted: people, data, failed runs, searches for settings, evaluation, storage, idle"
        " servers",
    ]
