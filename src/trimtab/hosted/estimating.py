"""What a run of an API will take, before its first request."""

from collections.abc import Sequence
from dataclasses import dataclass

from trimtab.hosted.host import HostedModel
from trimtab.hosted.ledger import Price, Usage, counted
from trimtab.hosted.writing import Task


@dataclass(frozen=True)
class Plan:
    """What a run takes at most; of prompts about, where the host's tokens cannot be counted.

    Attributes:
        calls: Most requests, without those that are repeated.
        usage: Most tokens; of prompts an estimate, as above.
    """

    calls: int
    usage: Usage

    def in_words(self, price: Price | None, way: str = "") -> str:
        """The bounds, and what they cost where the price is known.

        Args:
            price: For a million tokens.
            way: How tokens of prompts were estimated (default: they were counted).
        """
        cost = "" if price is None else f", {price.in_words(self.usage)}"
        if not way:
            return f"at most {self.usage.in_words(self.calls)}{cost}"
        written, read = self.usage.completion_tokens, self.usage.prompt_tokens
        return (
            f"at most {counted(self.calls, 'call')} and {written:,} completion tokens, about"
            f" {read:,} prompt tokens{cost} ({way})"
        )


def planned_alone(host: HostedModel, tasks: Sequence[Task]) -> Plan:
    """One request a prompt."""
    prompt = sum(host.count_read(task.sent, chat=task.chat) for task in tasks)
    return Plan(len(tasks), Usage(prompt, sum(task.max_new_tokens for task in tasks)))


def planned_candidates(host: HostedModel, tasks: Sequence[Task], count: int) -> Plan:
    """A request a prompt, or one a candidate.

    Those that a server leaves out are asked for once more, and are not foreseen.
    """
    requests = 1 if host.by.several else count
    usage = planned_alone(host, tasks).usage
    return Plan(
        len(tasks) * requests,
        Usage(usage.prompt_tokens * requests, usage.completion_tokens * count),
    )


def planned_steps(
    host: HostedModel, tasks: Sequence[Task], ahead: int, *, drafts_itself: bool
) -> Plan:
    """A request a token, in the worst case; each reads all that was written before.

    A place of which the API shows nothing is asked about once more, and is not foreseen.

    Args:
        host: The host.
        tasks: What to go on from.
        ahead: Tokens that a request asks for beyond the next.
        drafts_itself: The host writes these tokens; otherwise it reads the expert's.
    """
    plans = [_planned_steps(host, task, ahead, drafts_itself=drafts_itself) for task in tasks]
    usage = sum((plan.usage for plan in plans), Usage())
    return Plan(sum(plan.calls for plan in plans), usage)


def _planned_steps(host: HostedModel, task: Task, ahead: int, *, drafts_itself: bool) -> Plan:
    length, steps = host.count_read(task.prompt, chat=task.chat), task.max_new_tokens
    each = max(1 + ahead if drafts_itself else 1, host.by.shortest_tokens)
    calls, completion = steps, steps * each
    prompt = steps * length + steps * (steps - 1) // 2
    if ahead and not drafts_itself:
        # A draft that the host cuts otherwise is asked for again without it.
        calls, prompt = calls + steps, 2 * prompt + steps * ahead
        completion += steps
    if host.by.echo and not task.chat:
        # The host reads the prompt once more as evidence.
        calls, prompt, completion = calls + 1, prompt + length, completion + 1
    return Plan(calls, Usage(prompt, completion))
