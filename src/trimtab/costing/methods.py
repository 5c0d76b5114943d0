"""Each way to adapt a host, as the work it takes, once and for each host, and what a request costs.

The ways are those of docs/cost.md: prompting, a head on labels, Trimtab's carriers, QLoRA, LoRA and
full fine-tuning. Pure.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from trimtab.costing import flops, memory, serving, steps
from trimtab.costing.memory import Load
from trimtab.costing.ranges import Range
from trimtab.costing.steps import Question, Work

NOTHING = Range.exactly(0)


@dataclass(frozen=True)
class Request:
    """What answering takes.

    Attributes:
        sec: Seconds of the whole server for a request, of those answered together.
        gpus: Accelerators of the server.
        usd: Price of a request.
    """

    sec: Range
    gpus: int
    usd: Range


@dataclass(frozen=True)
class Estimate:
    """What a method costs.

    Attributes:
        method: Its name.
        once: Work that is done once, whatever the hosts.
        per_host: Work that is done for each host.
        usd_once: Price of the former.
        usd_per_host: Price of the latter.
        usd: Price of adapting all hosts that were asked for.
        further_hosts: What another host takes.
        request: What a request costs on one host.
        usd_per_million_answer_tokens: The same for a million tokens of answers, questions included.
    """

    method: str
    once: tuple[Work, ...]
    per_host: tuple[Work, ...]
    usd_once: Range
    usd_per_host: Range
    usd: Range
    further_hosts: str
    request: Request
    usd_per_million_answer_tokens: Range

    @property
    def work(self) -> tuple[Work, ...]:
        """All work for one host."""
        return self.once + self.per_host

    @property
    def flops(self) -> float:
        """Operations of adapting one host."""
        return sum(work.flops for work in self.work)

    @property
    def gpu_hours(self) -> Range:
        """Hours of one accelerator that adapting one host takes."""
        return sum((work.gpu_hours for work in self.work), NOTHING)

    @property
    def hours(self) -> Range:
        """Hours on the clock for one host, one piece of work after another."""
        return sum((work.hours for work in self.work), NOTHING)

    @property
    def gpus(self) -> Range | None:
        """Most accelerators that any piece of work occupies; None if one fits no number."""
        found = [work.gpus for work in self.work]
        if any(gpus is None for gpus in found):
            return None
        known = [gpus for gpus in found if gpus is not None] or [NOTHING]
        return Range(max(gpus.low for gpus in known), max(gpus.high for gpus in known))


def estimates(question: Question) -> list[Estimate]:
    """All methods, cheapest idea first."""
    few, long = question.config.few_shot_tokens, question.config.long_context_tokens
    needs_nothing = "nothing"
    made = (steps.lora(question, question.small, "tune"), steps.record(question))
    head = steps.fit(question, memory_too=False)
    light, seat = _steered(question), (steps.mount(question),)
    again = "train again"
    return [
        _estimate(question, "zero-shot prompt", ((), ()), needs_nothing, _plain(question)),
        _estimate(question, "few-shot prompt", ((), ()), needs_nothing, _prompted(question, few)),
        _estimate(question, "long context", ((), ()), needs_nothing, _prompted(question, long)),
        _estimate(
            question, "head on labels", ((), (steps.label_head(question),)), "fit again",
            _headed(question),
        ),
        _estimate(question, "Trimtab head", ((*made, head), seat), "mount", _headed(question)),
        _estimate(
            question, "Trimtab head+memory", ((*made, steps.fit(question)), seat), "mount", light
        ),
        _estimate(question, "Trimtab live", (made, ()), needs_nothing, _live(question)),
        _estimate(
            question, "QLoRA", ((), (steps.qlora(question, question.host),)), again,
            _with_lora(question),
        ),
        _estimate(
            question, "LoRA", ((), (steps.lora(question, question.host),)), again,
            _with_lora(question),
        ),
        _estimate(
            question, "full fine-tuning", ((), (steps.full(question, question.host),)), again,
            _plain(question),
        ),
    ]  # fmt: skip


def _estimate(
    question: Question,
    method: str,
    work: tuple[Sequence[Work], Sequence[Work]],
    further_hosts: str,
    request: Request,
) -> Estimate:
    once, per_host = map(tuple, work)
    usd_once, usd_per_host = (_usd(question, works) for works in (once, per_host))
    answers = 1e6 / question.config.answer_tokens
    return Estimate(
        method=method,
        once=once,
        per_host=per_host,
        usd_once=usd_once,
        usd_per_host=usd_per_host,
        usd=usd_once + usd_per_host.times(question.config.hosts),
        further_hosts=further_hosts,
        request=request,
        usd_per_million_answer_tokens=request.usd.times(answers),
    )


def _usd(question: Question, works: Sequence[Work]) -> Range:
    return sum((work.gpu_hours for work in works), NOTHING).times(question.usd_per_hour)


def _server(question: Question, extra_tokens: float, extra_bytes: float = 0) -> serving.Server:
    held = memory.serving_bytes(question.host, _load(question, extra_tokens)) + extra_bytes
    return serving.Server(
        question.gpu,
        memory.gpus_for_serving(held, question.gpu),
        question.sheet.factor("prefill_utilisation"),
        question.sheet.factor("bandwidth_utilisation"),
    )


def _load(question: Question, extra_tokens: float) -> Load:
    config = question.config
    context = config.question_tokens + extra_tokens + config.answer_tokens / 2
    return Load(config.requests_at_once, context)


def _request(question: Question, sec: Range, gpus: int) -> Request:
    return Request(sec, gpus, serving.usd(sec, gpus, question.usd_per_hour))


def _prompted(question: Question, extra_tokens: float) -> Request:
    """A request with examples or context; at best the server keeps what requests share."""
    config, server = question.config, _server(question, extra_tokens)
    tokens = config.question_tokens + extra_tokens
    own = serving.prefill_sec(question.host, config.question_tokens, server)
    whole = serving.prefill_sec(question.host, tokens, server)
    writing = serving.decode_sec(question.host, _load(question, extra_tokens), server)
    sec = Range(own.low, whole.high) + writing.times(config.answer_tokens)
    return _request(question, sec, server.gpus)


def _plain(question: Question) -> Request:
    return _prompted(question, 0)


def _with_lora(question: Question) -> Request:
    """A request to a host with LoRA: merged into it at best, beside it otherwise."""
    plain = _plain(question)
    slower = plain.sec.times(question.sheet.factor("lora_serving"))
    return _request(question, slower, plain.gpus)


def _beside(question: Question, needed: float) -> Request:
    """A request whose every answer token needs so many operations of the processor as well."""
    plain = _plain(question)
    token = Range.exactly(needed).over(question.sheet.factor("cpu_flops"))
    sec = plain.sec + token.times(question.config.answer_tokens)
    return _request(question, sec, plain.gpus)


def _headed(question: Question) -> Request:
    return _beside(question, flops.head_use_flops(question.host))


def _steered(question: Question) -> Request:
    """A request to a host with head and memory: the search by state is by processor."""
    search = flops.memory_search_flops(question.fit_tokens)
    return _beside(question, flops.head_use_flops(question.host) + search)


def _live(question: Question) -> Request:
    """A request to a host with expert and reference beside it, on the same accelerators."""
    config, load = question.config, _load(question, 0)
    server = _server(question, 0, extra_bytes=memory.serving_bytes(question.small, load))
    reading = serving.prefill_sec(question.host, config.question_tokens, server)
    small = serving.prefill_sec(question.small, config.question_tokens, server).times(2)
    passes = question.sheet.factor("live_passes")
    beside = Range(
        serving.decode_sec(question.small, load, server, passes.low).low,
        serving.decode_sec(question.small, load, server, passes.high).high,
    )
    writing = serving.decode_sec(question.host, load, server) + beside
    sec = reading + small + writing.times(config.answer_tokens)
    return _request(question, sec, server.gpus)
