"""Every method: what it takes, and what is measured then."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import NoReturn

import torch

from trimtab.backends.live import Live
from trimtab.comparing import sizes
from trimtab.comparing.bench import ADAPTER, LABEL_ADAPTER, Bench
from trimtab.comparing.budget import NotRun
from trimtab.comparing.scoring import Subject, with_preamble
from trimtab.comparing.split import excerpts
from trimtab.comparing.values import Step
from trimtab.config import CarrierName
from trimtab.costing.sheet import read_sheet
from trimtab.steering.processor import DEFAULT_CARRIERS, mixture_of

NOTHING, AGAIN, MOUNT = "nothing", "train again", "mount"


@dataclass(frozen=True)
class Made:
    """A method that is ready.

    Attributes:
        subject: What is measured.
        steps: What it took.
        artefact_bytes: Size of what has to be kept.
        note: What is to be known of how it was made.
    """

    subject: Subject
    steps: tuple[Step, ...] = ()
    artefact_bytes: int = 0
    note: str = ""


@dataclass(frozen=True)
class Method:
    """A way to adapt a host.

    Attributes:
        make: Makes it, for as long as the context lasts.
        estimate: Steps that it would take, from measured throughput.
        further_hosts: What another host takes.
    """

    make: Callable[[Bench], "Iterator[Made]"]
    estimate: Callable[[Bench], tuple[Step, ...]]
    further_hosts: str

    @contextmanager
    def made(self, bench: Bench) -> Iterator[Made]:
        """Make it, for as long as the context lasts.

        Raises:
            NotRun: It cannot be run here, or not within the budget.
        """
        yield from self.make(bench)


def _zero_shot(bench: Bench) -> Iterator[Made]:
    yield Made(Subject(bench.host))


def _few_shot(bench: Bench) -> Iterator[Made]:
    questions = bench.split.examples[: bench.config.examples]
    if questions:
        before = "".join(f"{q.prompt}{q.answer}\n\n" for q in questions)
        note = f"{len(questions)} solved questions stand before each; before a text, they too"
        ids = bench.host.encode(before)
    else:
        ids = excerpts(bench.split.train, bench.host.encode, bench.config.few_shot_tokens)
        note = f"beginnings of training documents, {len(ids)} tokens"
    yield _prompted(bench, ids, note)


def _context(bench: Bench) -> Iterator[Made]:
    limit = bench.config.context_tokens
    if bench.host.max_tokens is not None:
        # Room for a window of text, its first token, and an answer.
        limit = min(limit, bench.host.max_tokens - bench.config.window_tokens - 64)
    if limit < 1:
        raise NotRun(
            f"the host has positions for {bench.host.max_tokens} tokens, which a window of"
            f" {bench.config.window_tokens} fills"
        )
    ids = excerpts(bench.split.train, bench.host.encode, limit)
    yield _prompted(bench, ids, f"{len(ids)} tokens of training text stand before everything")


def _prompted(bench: Bench, ids: Sequence[int], note: str) -> Made:
    windows = bench.test_tokens / max(bench.config.window_tokens // 2, 1)
    tokens = 2 * bench.test_tokens + windows * len(ids)
    needed = sizes.reading_flops(bench.host_shape, tokens, len(ids) + bench.config.window_tokens)
    bench.budget.ask_for("scoring it", bench.budget.reading_sec(needed))
    size = sum(len(bench.host.vocabulary.token_bytes[i] or b"") for i in ids)
    return Made(Subject(with_preamble(bench.host, ids)), (), size, note)


def _small_steps(bench: Bench) -> tuple[Step, ...]:
    """Tuning the small model: what expert, head, memory and live have in common."""
    training = _lora_estimate(bench, bench.small_shape, "tune expert")
    if not bench.has_begun("tune expert"):
        bench.budget.ask_for("tuning the small model", training.sec)
    return (bench.tune_step(bench.config.small, "expert", bench.small_shape),)


def _expert(bench: Bench) -> Iterator[Made]:
    steps = _small_steps(bench)
    with bench.tuned_model("expert") as model:
        size = _size(bench.folder / "expert" / "lora")
        yield Made(Subject(model), steps, size, "the tuned small model in the host's place")


def _steered(carriers: Sequence[CarrierName]) -> Callable[[Bench], Iterator[Made]]:
    def make(bench: Bench) -> Iterator[Made]:
        steps = (*_small_steps(bench), _recorded(bench))
        made = (bench.fit_step(ADAPTER), bench.mount_step(ADAPTER))
        # The expert alone needs neither head nor memory, nor a seat on the host.
        is_seated = tuple(carriers) != ("expert",)
        steps += made if is_seated else ()
        mounted = bench.mounted(ADAPTER)
        live = Live(bench.pair("expert"), bench.host) if "expert" in carriers else None
        mixture = mixture_of(bench.host, mounted, carriers, 1.0, live)
        size = sum(mounted.manifest.bytes_of(name) for name in carriers)
        note = "; ".join(mounted.warnings) if is_seated else ""
        yield Made(Subject(bench.host, mixture.steering), steps, size, note)

    return make


def _recorded(bench: Bench) -> Step:
    if not bench.has_begun("record"):
        bench.budget.ask_for("recording", _adapter_estimate(bench)[-1].sec)
    return bench.record_step()


def _label_head(bench: Bench) -> Iterator[Made]:
    _small_steps(bench)
    _recorded(bench)
    step = bench.fit_step(LABEL_ADAPTER, labels=True)
    mounted = bench.mounted(LABEL_ADAPTER)
    mixture = mixture_of(bench.host, mounted, ("head",), 1.0, None)
    note = "fitted on the host's states to the text's own next tokens, without soft targets"
    size = mounted.manifest.bytes_of("head")
    yield Made(Subject(bench.host, mixture.steering), (step,), size, note)


def _tuned_host(method: str) -> Callable[[Bench], Iterator[Made]]:
    def make(bench: Bench) -> Iterator[Made]:
        shape, window = bench.host_shape, bench.config.train_window_tokens
        if method == "lora":
            estimate = _lora_estimate(bench, shape, "tune lora")
            held = sizes.lora_bytes(shape, bench.config.rank, window)
        else:
            estimate = _full_estimate(bench)
            held = sizes.full_bytes(shape, window)
        if not bench.has_begun(f"tune {method}"):
            bench.budget.ask_for_memory("training the host", held)
            bench.budget.ask_for("training the host", estimate.sec)
        step = bench.tune_step(bench.config.host, method, shape, method)
        part = "lora" if method == "lora" else "model"
        note = "the small model's settings, one learning rate: tune's default"
        with bench.tuned_model(method) as model:
            yield Made(Subject(model), (step,), _size(bench.folder / method / part), note)

    return make


def _qlora(bench: Bench) -> NoReturn:
    del bench
    if not torch.cuda.is_available():
        raise NotRun("4-bit training needs an NVIDIA GPU, and this machine has none")
    if find_spec("bitsandbytes") is None:
        raise NotRun("4-bit training needs the package bitsandbytes, which is not installed")
    raise NotRun("`trimtab tune` trains over weights of 16 or 32 bits, not of 4")


def _estimated(bench: Bench, name: str, needed: float, factor: float = 1.0) -> Step:
    sec = bench.budget.training_sec(needed) * factor
    return Step(name=name, flops=needed, sec=sec, is_estimated=True)


def _lora_estimate(bench: Bench, shape: sizes.Shape, name: str) -> Step:
    window, rank = bench.config.train_window_tokens, bench.config.rank
    return _estimated(bench, name, sizes.lora_flops(shape, bench.train_tokens, window, rank))


def _full_estimate(bench: Bench) -> Step:
    window = bench.config.train_window_tokens
    needed = sizes.full_flops(bench.host_shape, bench.train_tokens, window)
    return _estimated(bench, "tune full", needed)


def _qlora_estimate(bench: Bench) -> Step:
    slower = read_sheet().factor("qlora_slowdown").middle
    lora = _lora_estimate(bench, bench.host_shape, "tune qlora")
    return lora.model_copy(update={"sec": lora.sec * slower})


def _small_estimate(bench: Bench) -> tuple[Step, ...]:
    step = _lora_estimate(bench, bench.small_shape, "tune expert")
    return (step.model_copy(update={"serves_all_hosts": True}),)


def _adapter_estimate(bench: Bench) -> tuple[Step, ...]:
    tokens = bench.train_tokens / bench.config.epochs
    needed = 2 * sizes.reading_flops(bench.small_shape, tokens, 512)
    sec = bench.budget.reading_sec(needed)
    read = Step(name="record", flops=needed, sec=sec, is_estimated=True, serves_all_hosts=True)
    return (*_small_estimate(bench), read)


def _label_estimate(bench: Bench) -> tuple[Step, ...]:
    needed = sizes.reading_flops(bench.host_shape, bench.train_tokens / bench.config.epochs, 512)
    sec = bench.budget.reading_sec(needed)
    return (Step(name="fit label head", flops=needed, sec=sec, is_estimated=True),)


def _none(bench: Bench) -> tuple[Step, ...]:
    del bench
    return ()


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


METHODS: Mapping[str, Method] = {
    "zero-shot": Method(_zero_shot, _none, NOTHING),
    "few-shot": Method(_few_shot, _none, NOTHING),
    "context": Method(_context, _none, NOTHING),
    "expert": Method(_expert, _small_estimate, "has no host"),
    "trimtab": Method(_steered(DEFAULT_CARRIERS), _adapter_estimate, MOUNT),
    "lora": Method(
        _tuned_host("lora"),
        lambda bench: (_lora_estimate(bench, bench.host_shape, "tune lora"),),
        AGAIN,
    ),
    "live": Method(_steered(("expert",)), _adapter_estimate, NOTHING),
    "all": Method(_steered((*DEFAULT_CARRIERS, "expert")), _adapter_estimate, MOUNT),
    "label-head": Method(_label_head, _label_estimate, "fit again"),
    "qlora": Method(_qlora, lambda bench: (_qlora_estimate(bench),), AGAIN),
    "full": Method(_tuned_host("full"), lambda bench: (_full_estimate(bench),), AGAIN),
}
"""By name, in the order in which they are run: the bare host, what needs no training, the small
model, and LoRA on the host before what is slow to score, for it is what all are held against."""
