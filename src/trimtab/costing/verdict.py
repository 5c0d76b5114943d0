"""Where one adapter for many hosts pays and where it does not, from the estimates. Pure."""

import math
from collections.abc import Sequence

from trimtab.costing.methods import Estimate
from trimtab.costing.steps import Question
from trimtab.costing.table import number

RIVAL = "LoRA"
ADAPTERS = ("Trimtab head", "Trimtab head+memory", "Trimtab live")


def hosts_to_pay(adapter: Estimate, rival: Estimate) -> int | None:
    """Fewest hosts for which an adapter is cheaper to make than its rival, by the middles.

    Returns:
        A number of hosts; None if a further host costs the adapter no less than the rival.
    """
    saved = rival.usd_per_host.middle - adapter.usd_per_host.middle
    extra = adapter.usd_once.middle - rival.usd_once.middle
    if extra < 0:
        return 1
    return None if saved <= 0 else math.floor(extra / saved) + 1


def answers_to_pay_back(adapter: Estimate, rival: Estimate, bare: Estimate) -> float:
    """Millions of answer tokens after which dearer requests have used up what training saved.

    Args:
        adapter: The method with the cheaper making.
        rival: The one that it is compared with.
        bare: The host alone, as dear to serve as a LoRA that is merged into it.

    Returns:
        Infinity if requests are no dearer, 0 if nothing was saved.
    """
    saved = rival.usd.middle - adapter.usd.middle
    ours, theirs = adapter.usd_per_million_answer_tokens, bare.usd_per_million_answer_tokens
    dearer = ours.middle - theirs.middle
    if saved <= 0:
        return 0.0
    return math.inf if dearer <= 0 else saved / dearer


def break_even(question: Question, rows: Sequence[Estimate]) -> list[str]:
    """Statements on each adapter against LoRA on every host."""
    by_name = {row.method: row for row in rows}
    rival = by_name[RIVAL]
    hosts = question.config.hosts
    if rival.gpus is None:
        return [
            f"{RIVAL} on the host fits no number of {question.gpu.title}: nothing to compare with"
        ]
    bare = by_name["zero-shot prompt"]
    return [_statement(by_name[name], rival, bare, hosts) for name in ADAPTERS]


def _statement(adapter: Estimate, rival: Estimate, bare: Estimate, hosts: int) -> str:
    if adapter.gpus is None:
        return f"{adapter.method}: the small model fits no number of these accelerators"
    cheaper = hosts_to_pay(adapter, rival)
    ratio = rival.usd.middle / adapter.usd.middle
    if cheaper is None:
        return f"{adapter.method}: dearer to make than {rival.method} for any number of hosts"
    made = f"cheaper to make than {rival.method} from {_hosts(cheaper)} on"
    for_all = (
        f"{number(ratio)} times cheaper" if ratio >= 1 else f"{number(1 / ratio)} times dearer"
    )
    line = f"{adapter.method}: {made}; for {_hosts(hosts)} {for_all}"
    if ratio < 1:
        return line
    answers = answers_to_pay_back(adapter, rival, bare)
    if math.isinf(answers):
        return f"{line}, and requests are no dearer"
    return f"{line}, used up by dearer requests after {number(answers)}M answer tokens in all"


def _hosts(count: int) -> str:
    return f"{count:,} host{'' if count == 1 else 's'}"
