"""Every method: what it takes, and what is measured then."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from trimtab.backends.live import Live
from trimtab.backends.open import one_device
from trimtab.comparing import estimates, sizes
from trimtab.comparing.bench import ADAPTER, LABEL_ADAPTER, Bench
from trimtab.comparing.budget import NotRun
from trimtab.comparing.scoring import Subject, with_preamble
from trimtab.comparing.split import excerpts
from trimtab.comparing.values import Step
from trimtab.config import CarrierName, TuneMethod
from trimtab.errors import ModelError
from trimtab.steering.mounted import Mounted
from trimtab.steering.processor import DEFAULT_CARRIERS, mixture_of
from trimtab.store.adapter import MOUNT_FILE
from trimtab.store.expert import read_expert
from trimtab.tuning.four_bit import check_four_bit

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


def _asked(bench: Bench, work: str, estimate: Step, run: Callable[[], Step]) -> Step:
    """Run a step if its predicted time is left, or if it was begun: its pace then decides."""
    if not bench.has_begun(estimate.name):
        bench.budget.ask_for(work, estimate.sec)
    return run()


def _small_steps(bench: Bench) -> tuple[Step, ...]:
    """Tuning the small model: what expert, head, memory and live have in common."""
    (estimate,) = estimates.expert(bench)

    if estimate.is_estimated:
        bench.budget.ask_for_memory("tuning the small model", estimate.peak_bytes or 0)

    def run() -> Step:
        return bench.tune_step(bench.config.small, "expert", bench.small_shape)

    return (_asked(bench, "tuning the small model", estimate, run),)


def _recorded(bench: Bench) -> tuple[Step, ...]:
    steps = _small_steps(bench)
    estimate = estimates.recorded(bench)[-1]
    return (*steps, _asked(bench, "recording", estimate, bench.record_step))


def _expert(bench: Bench) -> Iterator[Made]:
    steps = _small_steps(bench)
    with bench.tuned_model("expert") as model:
        size = _size(bench.folder / "expert" / "lora")
        note = "; ".join(
            ("the tuned small model in the host's place", *_without_help(bench, "expert"))
        )
        yield Made(Subject(model), steps, size, note)


def _steered(carriers: Sequence[CarrierName]) -> Callable[[Bench], Iterator[Made]]:
    def make(bench: Bench) -> Iterator[Made]:
        steps = _recorded(bench)
        *_, fit, mount = estimates.adapter(bench)
        fitted = _asked(bench, "fitting", fit, lambda: bench.fit_step(ADAPTER))
        seated = _asked(bench, "mounting", mount, lambda: bench.mount_step(ADAPTER))
        # The expert alone needs neither head nor memory, nor a seat on the host.
        is_seated = tuple(carriers) != ("expert",)
        steps += (fitted, seated) if is_seated else ()
        mounted = bench.mounted(ADAPTER)
        live = (
            Live(bench.pair("expert"), bench.host, draft_tokens=0) if "expert" in carriers else None
        )
        mixture = mixture_of(bench.host, mounted, carriers, 1.0, live)
        size = _carried(bench, ADAPTER, mounted, carriers)
        notes = mounted.warnings if is_seated else ()
        note = "; ".join((*notes, *_without_help(bench, "expert")))
        yield Made(Subject(bench.host, mixture.steering), steps, size, note)

    return make


def _carried(bench: Bench, adapter: str, mounted: Mounted, carriers: Sequence[CarrierName]) -> int:
    """Bytes of carriers, with what seats them on a host; an expert beside it needs no seat."""
    size = sum(mounted.manifest.bytes_of(name) for name in carriers)
    if tuple(carriers) == ("expert",):
        return size
    return size + (bench.folder / adapter / MOUNT_FILE).stat().st_size


def _label_head(bench: Bench) -> Iterator[Made]:
    steps = _recorded(bench)
    estimate = estimates.label_head(bench)[-1]
    fitted = _asked(bench, "fitting", estimate, lambda: bench.fit_step(LABEL_ADAPTER, labels=True))
    steps += (fitted, bench.mount_step(LABEL_ADAPTER))
    mounted = bench.mounted(LABEL_ADAPTER)
    mixture = mixture_of(bench.host, mounted, ("head",), 1.0, None)
    note = (
        "fitted on the host's states to the text's own next tokens, without soft targets; the"
        " recording, which says what the text is, counts as its cost too"
    )
    size = _carried(bench, LABEL_ADAPTER, mounted, ("head",))
    yield Made(Subject(bench.host, mixture.steering), steps, size, note)


def _tuned_host(method: TuneMethod) -> Callable[[Bench], Iterator[Made]]:
    def make(bench: Bench) -> Iterator[Made]:
        (estimate,) = METHODS[method].estimate(bench)
        if estimate.is_estimated:
            if method == "qlora":
                _check_four_bit()
            bench.budget.ask_for_memory("training the host", estimate.peak_bytes or 0)

        def run() -> Step:
            return bench.tune_step(bench.config.host, method, bench.host_shape, method)

        step = _asked(bench, "training the host", estimate, run)
        part = "model" if method == "full" else "lora"
        rate = "its usual one" if method == "full" else "tried out on held-out text, as the small's"
        note = f"the small model's settings, and for a learning rate {rate}"
        if method == "qlora":
            note += "; trained over weights of four bits, and then beside the host's own"
        note = "; ".join((note, *_without_help(bench, method)))
        with bench.tuned_model(method) as model:
            yield Made(Subject(model), (step,), _size(bench.folder / method / part), note)

    return make


def _without_help(bench: Bench, name: str) -> tuple[str, ...]:
    """What is to be said of a training that the held-out documents did not gain by."""
    held_out = read_expert(bench.folder / name, verify=False).held_out
    if held_out is None or held_out.has_gained:
        return ()
    return (f"training ({name}) did not help on held-out documents: it is the model as it was",)


def _check_four_bit() -> None:
    try:
        check_four_bit(one_device())
    except ModelError as error:
        raise NotRun(f"{error.message} ({error.hint})") from error


def _none(bench: Bench) -> tuple[Step, ...]:
    del bench
    return ()


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


METHODS: Mapping[str, Method] = {
    "zero-shot": Method(_zero_shot, _none, NOTHING),
    "few-shot": Method(_few_shot, _none, NOTHING),
    "context": Method(_context, _none, NOTHING),
    "expert": Method(_expert, estimates.expert, "has no host"),
    "trimtab": Method(_steered(DEFAULT_CARRIERS), estimates.adapter, MOUNT),
    "lora": Method(
        _tuned_host("lora"),
        lambda bench: (estimates.lora(bench, bench.host_shape, "lora"),),
        AGAIN,
    ),
    "live": Method(_steered(("expert",)), estimates.recorded, NOTHING),
    "all": Method(_steered((*DEFAULT_CARRIERS, "expert")), estimates.adapter, MOUNT),
    "label-head": Method(_label_head, estimates.label_head, "fit again"),
    "qlora": Method(_tuned_host("qlora"), lambda bench: (estimates.qlora(bench),), AGAIN),
    "full": Method(_tuned_host("full"), lambda bench: (estimates.full(bench),), AGAIN),
}
"""By name, in the order in which they are run: the bare host, what needs no training, the small
model, and LoRA on the host before what is slow to score, for it is what all are held against."""
