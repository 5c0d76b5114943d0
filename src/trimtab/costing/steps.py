"""Hours and money of each piece of work that adapting a model is made of. Pure."""

from dataclasses import dataclass

from trimtab.config import CostConfig
from trimtab.costing import flops, memory
from trimtab.costing.ranges import Range
from trimtab.costing.sheet import Gpu, Shape, Sheet

ANCHORS = 16384
RECORD_OVERLAP = 512 / 448
"""Positions that record runs for each that it keeps (RecordConfig's window over stride)."""

GATE_POSITIONS = 4_096
"""Positions of each kind of text that a memory's gates are learnt on (`fitting/memory.py`)."""


@dataclass(frozen=True)
class Question:
    """What is asked, with everything looked up that it names.

    Attributes:
        config: The user's numbers.
        sheet: Hardware, prices, factors.
        gpu: The accelerator.
        usd_per_hour: Of one accelerator.
        host: Sizes of the host.
        small: Sizes of the small model.
    """

    config: CostConfig
    sheet: Sheet
    gpu: Gpu
    usd_per_hour: Range
    host: Shape
    small: Shape

    @staticmethod
    def of(config: CostConfig, sheet: Sheet) -> "Question":
        """Look up what a configuration names.

        Raises:
            InputError: The sheet does not have the accelerator.
        """
        gpu = sheet.gpu(config.gpu)
        given = config.price
        usd = gpu.usd_per_hour if given is None else Range.exactly(given)
        host, small = sheet.shape(config.host_params), sheet.shape(config.small_params)
        return Question(config, sheet, gpu, usd, host, small)

    @property
    def utilisation(self) -> Range:
        """Share of the peak operations that training reaches."""
        return Range(self.config.utilisation_low, self.config.utilisation_high)

    @property
    def attended(self) -> float:
        """Earlier tokens that a token of a training window attends to, on average."""
        return self.config.window_tokens / 2

    @property
    def fit_tokens(self) -> float:
        """Recorded tokens of training text that fit uses."""
        asked = self.config.fit_tokens
        kept = self.config.tokens * (1 - self.sheet.factor("held_out_share").low)
        return kept if asked is None else min(asked, kept)

    @property
    def probe_tokens(self) -> float:
        """Tokens of general text that record, fit and mount read."""
        return self.sheet.factor("probe_tokens").low


@dataclass(frozen=True)
class Work:
    """A piece of work.

    Attributes:
        name: What it is.
        flops: Floating-point operations.
        gpus: Accelerators that it occupies, at least and at most; None if it fits no number.
        gpu_hours: Hours of one accelerator that are paid.
    """

    name: str
    flops: float
    gpus: Range | None
    gpu_hours: Range

    @property
    def hours(self) -> Range:
        """Hours on the clock, if the accelerators share the work evenly."""
        return self.gpu_hours.over(self.gpus or Range.exactly(1))


def gpu_work(
    question: Question, name: str, needed: float, gpus: Range | None, *, loaded: float = 0
) -> Work:
    """Work that accelerators do.

    Args:
        question: What is asked.
        name: What it is.
        needed: Floating-point operations.
        gpus: Accelerators that it occupies; None if it fits no number of them.
        loaded: Bytes of weights that are loaded first, while all accelerators wait.
    """
    busy = Range.exactly(needed / question.gpu.bf16_flops / 3600).over(question.utilisation)
    waiting = Range.exactly(loaded / 3600).over(question.sheet.factor("load_bytes_per_sec"))
    return Work(name, needed, gpus, busy + waiting.times(gpus or Range.exactly(1)))


def cpu_work(question: Question, name: str, needed: float, gpus: Range | None) -> Work:
    """Work that the processor beside paid and idle accelerators does."""
    busy = Range.exactly(needed / 3600).over(question.sheet.factor("cpu_flops"))
    return Work(name, needed, gpus, busy.times(gpus or Range.exactly(1)))


def gpus_range(question: Question, shape: Shape, state: Range) -> Range | None:
    """Accelerators for a training whose state is so large; None if no number suffices."""
    window = question.config.window_tokens
    found = [
        memory.gpus_for_training(bytes_, shape, window, question.gpu)
        for bytes_ in (state.low, state.high)
    ]
    low, high = found
    return None if low is None or high is None else Range(low, high)


def full(question: Question, shape: Shape) -> Work:
    """Full fine-tuning."""
    per_token = flops.full_training_flops(shape, question.attended)
    state = memory.full_state_bytes(shape, question.sheet.factor("full_state_bytes"))
    return _training(question, "full fine-tuning", shape, per_token, state)


def lora(question: Question, shape: Shape, name: str = "LoRA") -> Work:
    """LoRA over 16-bit weights."""
    rank = question.config.lora_rank
    per_token = flops.lora_training_flops(shape, question.attended, rank)
    state = Range.exactly(memory.lora_state_bytes(shape, rank))
    return _training(question, name, shape, per_token, state)


def qlora(question: Question, shape: Shape) -> Work:
    """LoRA over 4-bit weights: less memory, the same operations, more hours."""
    rank = question.config.lora_rank
    per_token = flops.lora_training_flops(shape, question.attended, rank)
    state = Range.exactly(memory.qlora_state_bytes(shape, rank))
    work = _training(question, "QLoRA", shape, per_token, state)
    slower = work.gpu_hours.times(question.sheet.factor("qlora_slowdown"))
    return Work(work.name, work.flops, work.gpus, slower)


def _training(question: Question, name: str, shape: Shape, per_token: float, state: Range) -> Work:
    config = question.config
    needed = config.tokens * config.epochs * per_token
    gpus = gpus_range(question, shape, state)
    return gpu_work(question, name, needed, gpus, loaded=memory.BF16_BYTES * shape.params)


def serving_gpus(question: Question, shape: Shape) -> int:
    """Accelerators that hold a model for forward passes alone."""
    return memory.gpus_for_serving(memory.BF16_BYTES * shape.params * 1.02, question.gpu)


def record(question: Question) -> Work:
    """Passes of expert and reference over training text, of the reference over all other."""
    held_out = question.config.tokens * question.sheet.factor("held_out_share").low
    read = 2 * (question.config.tokens - held_out) + held_out + question.probe_tokens
    needed = RECORD_OVERLAP * read * flops.hidden_flops(question.small, 256)
    gpus = Range.exactly(serving_gpus(question, question.small))
    return gpu_work(question, "record", needed, gpus, loaded=2.0 * question.small.params)


def fit(question: Question, *, memory_too: bool = True) -> Work:
    """The head's and the memory's fit, which run on the processor."""
    positions = question.fit_tokens + question.probe_tokens
    head = flops.HeadFit(positions, question.small.hidden)
    needed = flops.head_fit_flops(head)
    if memory_too:
        held_out = question.config.tokens * question.sheet.factor("held_out_share").low
        asked = sum(min(tokens, GATE_POSITIONS) for tokens in (held_out, question.probe_tokens))
        made = flops.MemoryFit(question.fit_tokens, asked)
        needed += flops.memory_fit_flops(made, question.small)
    return cpu_work(question, "fit", needed, Range.exactly(1))


def mount(question: Question) -> Work:
    """The map, and one pass of the host over the probe text: once for each host."""
    gpus = Range.exactly(serving_gpus(question, question.host))
    reading = question.probe_tokens * flops.hidden_flops(question.host, 256)
    passed = gpu_work(question, "mount", reading, gpus, loaded=2.0 * question.host.params)
    algebra = flops.map_flops(ANCHORS, question.small, question.host, question.probe_tokens)
    solved = cpu_work(question, "mount", algebra, gpus)
    return Work("mount", reading + algebra, gpus, passed.gpu_hours + solved.gpu_hours)


def label_head(question: Question) -> Work:
    """A head on the host, fitted to the text's own next tokens: one pass of the host, one fit."""
    positions = question.fit_tokens + question.probe_tokens
    gpus = Range.exactly(serving_gpus(question, question.host))
    reading = RECORD_OVERLAP * positions * flops.hidden_flops(question.host, 256)
    passed = gpu_work(question, "label head", reading, gpus, loaded=2.0 * question.host.params)
    fitting = flops.head_fit_flops(flops.HeadFit(positions, question.host.hidden, flops.ACTIVE))
    solved = cpu_work(question, "label head", fitting, Range.exactly(1))
    return Work("label head", reading + fitting, gpus, passed.gpu_hours + solved.gpu_hours)
