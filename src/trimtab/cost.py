"""Estimate what each way to adapt a host costs; nothing is run."""

import json
from dataclasses import dataclass
from typing import Any

from trimtab.config import CostConfig
from trimtab.costing.methods import Estimate, estimates
from trimtab.costing.ranges import Range
from trimtab.costing.sheet import read_sheet
from trimtab.costing.steps import Question, Work
from trimtab.costing.table import assumptions, number, table
from trimtab.costing.verdict import break_even
from trimtab.types import Progress, silent


@dataclass(frozen=True)
class CostResult:
    """What adapting costs.

    Attributes:
        question: What was asked, with everything looked up.
        estimates: One a method.
    """

    question: Question
    estimates: tuple[Estimate, ...]

    def summary(self) -> str:
        """The table, what follows from it, and its assumptions."""
        config = self.question.config
        title = (
            f"Adapting {'one host' if config.hosts == 1 else f'{config.hosts:,} hosts'} of"
            f" {number(config.host_params / 1e9)}B parameters with"
            f" {number(config.tokens / 1e6)}M tokens: lowest and highest plausible cost"
        )
        lines = [title, "", table(self.question, self.estimates), ""]
        lines += [*break_even(self.question, self.estimates), "", "assumptions"]
        lines += [f"  {line}" for line in assumptions(self.question)]
        return "\n".join(lines)

    def as_json(self) -> str:
        """The same with all digits, for programs."""
        content = {
            "schema": 1,
            "config": self.question.config.model_dump(mode="json"),
            "sheet": self.question.sheet.date.isoformat(),
            "usd_per_gpu_hour": _pair(self.question.usd_per_hour),
            "methods": {row.method: _method(row) for row in self.estimates},
            "break_even": break_even(self.question, self.estimates),
            "assumptions": assumptions(self.question),
        }
        return json.dumps(content, indent=1)


def cost(config: CostConfig, *, progress: Progress = silent) -> CostResult:
    """Estimate computation, memory, hours and money of each way to adapt a host.

    Args:
        config: Sizes, text, accelerator, price and use.
        progress: Unused, since nothing takes long; all verbs have it.

    Returns:
        An estimate for each method, as a table (`summary()`) and as JSON (`as_json()`).

    Raises:
        InputError: The sheet does not have the accelerator.
    """
    del progress
    question = Question.of(config, read_sheet())
    return CostResult(question, tuple(estimates(question)))


def _pair(value: Range | None) -> list[float] | None:
    return None if value is None else [value.low, value.high]


def _work(work: Work) -> dict[str, Any]:
    return {
        "name": work.name,
        "flops": work.flops,
        "gpus": _pair(work.gpus),
        "gpu_hours": _pair(work.gpu_hours),
        "hours": _pair(work.hours),
    }


def _method(row: Estimate) -> dict[str, Any]:
    return {
        "once": [_work(work) for work in row.once],
        "per_host": [_work(work) for work in row.per_host],
        "flops": row.flops,
        "gpus": _pair(row.gpus),
        "gpu_hours": _pair(row.gpu_hours),
        "hours": _pair(row.hours),
        "usd_once": _pair(row.usd_once),
        "usd_per_host": _pair(row.usd_per_host),
        "usd_all_hosts": _pair(row.usd),
        "another_host": row.further_hosts,
        "serving_gpus": row.request.gpus,
        "usd_per_request": _pair(row.request.usd),
        "usd_per_million_answer_tokens": _pair(row.usd_per_million_answer_tokens),
    }
