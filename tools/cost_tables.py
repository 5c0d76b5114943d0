"""Tables of docs/cost.md: the model against measurements, published figures and the claims."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trimtab.config import CostConfig
from trimtab.cost import cost
from trimtab.costing import flops, steps
from trimtab.costing.ranges import Range
from trimtab.costing.sheet import Sheet, Source, read_sheet
from trimtab.costing.steps import Question, Work
from trimtab.costing.table import number, shown

ROOT = Path(__file__).resolve().parents[1]
DEMO = ROOT / "bench" / "results" / "2026-11-26-demo-two-rows.json"
DEMO_TOKENS = ROOT / "bench" / "results" / "2026-11-26-demo-tokens.json"
CPU = ROOT / "bench" / "results" / "2026-11-25-cpu-flops.json"
CPU_STEPS = ROOT / "bench" / "results" / "2026-11-25-cpu-steps.json"
PUBLISHED = ROOT / "bench" / "cost" / "published.json"
CORES = 2
VALIDATIONS = 3
LIMITED_FIT_TOKENS = 1e6
BASE = {"host_params": 70e9, "small_params": 7e9, "gpu": "h100"}


def blocks() -> dict[str, str]:
    """All generated blocks of docs/cost.md, by name."""
    sheet, published = read_sheet(), json.loads(PUBLISHED.read_text(encoding="utf-8"))
    return {
        "steps": steps_table(),
        "example": example(),
        "many": example(hosts=5, fit_tokens=LIMITED_FIT_TOKENS),
        "demo": demo_table(sheet),
        "published": published_table(published["rows"], sheet),
        "gpus": gpus_table(published["memory"], sheet),
        "claims": claims_table(published["claims"], sheet),
        "case": case_table(published["claims"]["case"], sheet),
        "prices": prices_table(sheet),
        "factors": factors_table(sheet),
    }


def markdown(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """A table; upright bars in cells are escaped."""
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join(
        f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines
    )


def example(**given: Any) -> str:
    """What the command prints for the example."""
    asked = {**BASE, "tokens": 50e6, "price": 2.5, **given}
    spelled = {"host_params": "70e9", "small_params": "7e9", "tokens": "50e6", "fit_tokens": "1e6"}
    words = (f"--{k.replace('_', '-')} {spelled.get(k, v)}" for k, v in asked.items())
    said = cost(CostConfig.model_validate(asked)).summary()
    return f"```\n$ trimtab cost {' '.join(words)}\n{said}\n```"


def cpu_flops() -> float:
    """Operations a second of the cores of the demo's kind of machine, at the fastest size."""
    rows = json.loads(CPU.read_text(encoding="utf-8"))["rows"]
    return CORES * max(row["flops_per_sec"] for row in rows)


def demo_flops(sheet: Sheet) -> dict[str, float]:
    """Operations of the demo's steps, from its tokens and the two models' sizes.

    In the run that was measured both models read all text that was recorded.
    """
    report = json.loads(DEMO.read_text(encoding="utf-8"))
    counted = json.loads(DEMO_TOKENS.read_text(encoding="utf-8"))
    small, host = (sheet.shape(counted[who]["params"]) for who in ("small", "host"))
    train = max(point["recorded_tokens"] for point in report["growth"])
    held_out = counted["text_tokens"] - train
    probe = counted["probe_tokens"]
    validated = VALIDATIONS * held_out * flops.forward_flops(small, 128)
    head = flops.HeadFit(train + probe, small.hidden, epochs=counted["head_epochs"])
    asked = sum(min(tokens, steps.GATE_POSITIONS) for tokens in (held_out, probe))
    memory = flops.MemoryFit(train, asked)
    recorded = steps.RECORD_OVERLAP * (counted["text_tokens"] + probe)
    seated = counted["host_probe_tokens"]
    return {
        "tune": train * flops.lora_training_flops(small, 128, 16) + validated,
        "record": 2 * recorded * flops.hidden_flops(small, 256),
        "fit": flops.head_fit_flops(head) + flops.memory_fit_flops(memory, small),
        "mount": seated * flops.hidden_flops(host, 256)
        + flops.map_flops(steps.ANCHORS, small, host, seated),
    }


def steps_table() -> str:
    """Predicted and measured seconds of pieces of work on one core."""
    found = json.loads(CPU_STEPS.read_text(encoding="utf-8"))
    rows = []
    for row in found["rows"]:
        least = row["flops"] / found["flops_per_sec"]
        rows.append(
            (row["work"], f"{row['flops']:.2e}", f"{least:.2f}", f"{row['sec']:.2f}",
             f"{row['sec'] / least:.2f}", f"{100 * least / row['sec']:.0f} %")
        )  # fmt: skip
    head = ("work", "operations", "predicted, s", "measured, s", "ratio", "utilisation")
    return markdown(head, rows)


def demo_table(sheet: Sheet) -> str:
    """Predicted and measured seconds of the demo's steps on two cores."""
    measured = json.loads(DEMO.read_text(encoding="utf-8"))["wall_sec"]
    peak = cpu_flops()
    rows = []
    for step, needed in demo_flops(sheet).items():
        least, took = needed / peak, measured[step]
        rows.append(
            (step, f"{needed:.2e}", f"{least:.1f}", f"{took:.1f}", f"{took / least:.1f}",
             f"{100 * least / took:.0f} %")
        )  # fmt: skip
    head = ("step", "operations", "predicted, s", "measured, s", "ratio", "utilisation")
    return markdown(head, rows)


def published_question(row: Mapping[str, Any], sheet: Sheet, tokens: float) -> Question:
    """The question whose answer a published run is."""
    config = CostConfig(
        host_params=row["params"],
        small_params=row["params"],
        tokens=max(tokens, 1),
        gpu=row["gpu"],
        window_tokens=row["window_tokens"],
    )
    return Question.of(config, sheet)


def training_flops(row: Mapping[str, Any], question: Question) -> float:
    """Operations that a published run needs."""
    if row["method"] == "full":
        token = flops.full_training_flops(question.host, question.attended)
    else:
        rank = question.config.lora_rank
        token = flops.lora_training_flops(question.host, question.attended, rank)
    return question.config.tokens * token


def published_table(rows: list[dict[str, Any]], sheet: Sheet) -> str:
    """Predicted and measured hours of published trainings, and the utilisation that follows."""
    shown_rows = []
    for row in rows:
        tokens = Range(*row["tokens"])
        question = published_question(row, sheet, tokens.high)
        peak = row["gpus"] * question.gpu.bf16_flops * row.get("peak_factor", 1) * 3600
        least = tokens.times(training_flops(row, question) / tokens.high / peak)
        hours = least.over(question.utilisation)
        if row["method"] == "qlora":
            hours = hours.times(sheet.factor("qlora_slowdown"))
        source = row["source"]
        shown_rows.append(
            (row["name"], f"{row['gpus']} {row['gpu']}", bounded(tokens.times(1e-6), "M"),
             bounded(hours), f"{row['hours']:.2g}", bounded(Range.exactly(row["hours"]).over(hours))
             if tokens.low else f"at least {number(row['hours'] / hours.high)}",
             bounded(least.over(row["hours"] / 100), " %"),
             f"[{source['date']}]({source['address']}): {source['note']}")
        )  # fmt: skip
    head = ("run", "on", "tokens", "predicted, h", "measured, h", "ratio", "utilisation", "source")
    return markdown(head, shown_rows)


def bounded(value: Range, unit: str = "") -> str:
    """A range, or its upper bound where the lower one is not known."""
    return f"{shown(value) if value.low else f'at most {number(value.high)}'}{unit}"


def gpus_table(rows: list[dict[str, Any]], sheet: Sheet) -> str:
    """Predicted and published numbers of accelerators."""
    made = {"full": steps.full, "lora": steps.lora, "qlora": steps.qlora}
    shown_rows = []
    for row in rows:
        question = published_question(row, sheet, 10e6)
        work = made[row["method"]](question, question.host)
        source = row["source"]
        shown_rows.append(
            (row["name"], question.gpu.title, shown(work.gpus), str(row["gpus"]),
             f"[{source['date']}]({source['address']}): {source['note']}")
        )  # fmt: skip
    return markdown(("training", "accelerator", "predicted", "published", "source"), shown_rows)


def answer(tokens: float, sheet: Sheet, **given: Any) -> dict[str, tuple[Range, Range, Question]]:
    """Money and hours by method, at the listed prices of an H100."""
    config = CostConfig.model_validate({**BASE, "tokens": tokens, **given})
    result = cost(config)
    question = Question.of(config, sheet)
    return {row.method: (row.usd, row.hours, question) for row in result.estimates}


def claims_table(claims: Mapping[str, Any], sheet: Sheet) -> str:
    """Each line of the claimed table beside the model, and the text for which it would hold."""
    tokens = claims["tokens"]
    found = answer(tokens, sheet)
    limited = answer(tokens, sheet, fit_tokens=LIMITED_FIT_TOKENS)
    rows = []
    for claim in claims["rows"]:
        usd, hours, question = found[claim["method"]]
        low, high = claim["usd"]
        claimed = f"${low:,}+" if high is None else f"${low:,}-{high:,}"
        asked = Range(low, high or low)
        rows.append(
            (claim["method"], claimed, "{}-{} days".format(*claim["days"]), f"${shown(usd)}",
             f"{shown(hours)} h", f"{shown(holds_for(claim['method'], asked, question))}",
             said(usd, asked))
        )  # fmt: skip
        if claim["method"] == "Trimtab head+memory":
            usd, hours, _ = limited[claim["method"]]
            rows.append(
                ("the same, fit on 1M tokens", claimed, "", f"${shown(usd)}", f"{shown(hours)} h",
                 "", said(usd, asked))
            )  # fmt: skip
    head = ("method", "claimed", "claimed time", "model, 50M tokens", "model, time",
            "millions of tokens at which the claim holds", "verdict")  # fmt: skip
    return markdown(head, rows)


def said(usd: Range, claimed: Range) -> str:
    """In words, whether a claimed price lies within, above or below the model's bounds."""
    if usd.high < claimed.low:
        times = claimed.over(usd)
        return f"refuted: {number(times.low)} to {number(times.high)} times too high"
    if usd.low > claimed.high:
        return "refuted: too low"
    return "within the bounds"


def holds_for(method: str, claimed: Range, question: Question) -> Range:
    """Millions of training tokens for which the model's bounds give the claimed price.

    The adapter's are of tune and record alone: fit and mount need not grow with the text.
    """
    works: dict[str, tuple[Work, ...]] = {
        "full fine-tuning": (steps.full(question, question.host),),
        "LoRA": (steps.lora(question, question.host),),
        "QLoRA": (steps.qlora(question, question.host),),
        "Trimtab head+memory": (
            steps.lora(question, question.small, "tune"),
            steps.record(question),
        ),
    }
    hours = sum((work.gpu_hours for work in works[method]), Range.exactly(0))
    per_million = hours.times(question.usd_per_hour).over(question.config.tokens / 1e6)
    return claimed.over(per_million)


def case_table(case: Mapping[str, Any], sheet: Sheet) -> str:
    """The claimed case of medical records: what the model gives for it."""
    low, high = (case["records"] * each for each in case["tokens_per_record"])
    few, many = (answer(tokens, sheet, epochs=3) for tokens in (low, high))
    small_fit = [answer(t, sheet, epochs=3, fit_tokens=LIMITED_FIT_TOKENS) for t in (low, high)]
    adapter = "Trimtab head+memory"
    rows = []
    for method, claimed, (least, most), name in (
        (adapter, case["adapter_eur"], (few, many), adapter),
        (adapter, None, small_fit, f"{adapter}, fit on 1M tokens"),
        ("Trimtab live", None, (few, many), "Trimtab live"),
        ("LoRA", None, (few, many), "LoRA"),
        ("full fine-tuning", case["full_eur"], (few, many), "full fine-tuning"),
    ):
        usd = Range(least[method][0].low, most[method][0].high)
        told = "" if claimed is None else f"EUR {claimed:,}"
        rows.append((name, told, f"${shown(usd)}"))
    return markdown(("method", "claimed", f"model, three passes over"
                     f" {number(low / 1e6)}M to {number(high / 1e6)}M tokens"), rows)  # fmt: skip


def cited(source: Source) -> str:
    """A source as a link, or as a file's name, with its date and note."""
    link = source.address.startswith("http")
    address = f"[{source.date}]({source.address})" if link else f"`{source.address}`, {source.date}"
    return f"{address}{': ' if source.note else ''}{source.note}"


def prices_table(sheet: Sheet) -> str:
    """Accelerators and what they cost."""
    rows = []
    for name, gpu in sheet.gpus.items():
        offers = "; ".join(
            f"{o.provider} {o.usd_per_gpu_hour:.2f} ([{o.source.date}]({o.source.address}))"
            for o in gpu.offers
        )
        rows.append(
            (f"`{name}`", gpu.title, f"{gpu.bf16_flops / 1e12:.0f}",
             f"{gpu.memory_bytes / 1e9:.0f}", f"{gpu.bandwidth / 1e12:.2f}", cited(gpu.source),
             offers)
        )  # fmt: skip
    head = ("name", "accelerator", "TFLOP/s", "GB", "TB/s", "source", "dollars an hour")
    return markdown(head, rows)


def factors_table(sheet: Sheet) -> str:
    """Factors with their meaning and sources."""
    rows = [
        (name.replace("_", " "), shown(factor.range), factor.meaning,
         "; ".join(map(cited, factor.sources)) or "assumption")
        for name, factor in sheet.factors.items()
    ]  # fmt: skip
    return markdown(("factor", "bounds", "meaning", "sources"), rows)
