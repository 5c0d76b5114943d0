"""The whole main job: tune, record, fit, mount, evaluate, generate, and a report.

Every step continues where an interrupted run stopped: run the same command again.
"""

import argparse
import os
import re
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from pathlib import Path

import trimtab
from examples.demo import corpus, models
from examples.demo.clock import Clock
from examples.demo.completions import COMPLETIONS_NOTE, KEPT_NAME, completed
from examples.demo.next_steps import next_steps, write_playground
from trimtab import (
    EvaluateConfig,
    FitConfig,
    MountConfig,
    RecordConfig,
    TuneConfig,
)
from trimtab.backends.hf import HFModel
from trimtab.backends.open import open_model
from trimtab.cli_errors import run_program
from trimtab.errors import InputError
from trimtab.evaluate import Evaluation, first_documents
from trimtab.progress import Display
from trimtab.report import (
    Completion,
    GrowthPoint,
    Report,
    merge_hosts,
    perplexity,
    table,
    write_report,
)
from trimtab.steering.kept import Kept
from trimtab.store.home import HOME_VARIABLE
from trimtab.store.manifest import read_manifest

SMALL = "smollm2-135m-instruct"
HOST = "gemma-3-270m"
OUT = Path("build/demo")
CACHE = Path("build/cache")
TEXTS = Path("build/texts")

CHOICE = corpus.Choice(seed=0, test_files=16, train_bytes=40_000)
EVALUATED_TOKENS = 4_096
"""Host tokens of held-out text, so that the demo ends within minutes on two slow cores."""
DOCUMENT_TOKENS = 256
COMPLETIONS = 3
VALIDATIONS = 1
GENERAL_TOKENS = 8_192
"""Half of the probe text: head and memory lose a twentieth of what they gain."""
HEAD_EPOCHS = 3
GROWTH_TOKENS = 6_144
"""Part of the recording whose memory is measured beside the whole; it costs a fit and a
measurement."""
GROWTH_ROWS = ("host", "memory")
GROWTH_SCORED_TOKENS = 1_024
SEED = 0
READING_SEC = 5
"""Time in which a person can read whose terms apply, before anything is downloaded."""


@dataclass(frozen=True)
class Model:
    """A model by what `open_model` takes, by its name for people, and its terms."""

    ref: str
    title: str
    licence: str = "not stated"


@dataclass(frozen=True)
class Job:
    """What one run of the demo works on.

    Attributes:
        small: The small model.
        hosts: The larger models.
        out: Folder of everything that the run leaves.
    """

    small: Model
    hosts: tuple[Model, ...]
    out: Path

    @property
    def train(self) -> Path:
        """Training text of the domain."""
        return self.out / "zig" / "train"

    @property
    def test(self) -> Path:
        """Held-out files of the domain, whole."""
        return self.out / "zig" / "test"

    @property
    def scored(self) -> Path:
        """What is scored of them: their middles."""
        return self.out / "zig" / "scored"

    @property
    def general(self) -> Path:
        """General text, one folder a kind."""
        return self.out / "general"

    @property
    def adapter(self) -> Path:
        """The adapter."""
        return self.out / "zig.adapter"


def main(words: Sequence[str] | None = None) -> None:
    """Run the demo from the command line; exits with the same statuses as `trimtab`."""
    given = _arguments(words)
    os.environ.setdefault(HOME_VARIABLE, str(CACHE))
    run_program(lambda: run(given.small, given.host, given.out))


def _arguments(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="demo", description=(__doc__ or "").split("\n")[0])
    kinds = f"hub name, folder, GGUF file, or one of {', '.join(models.MODELS)}"
    parser.add_argument("--small", default=SMALL, help=f"small model: {kinds}")
    parser.add_argument("--host", nargs="+", default=[HOST], help="larger models, alike")
    parser.add_argument("--out", type=Path, help=f"folder of the results [{OUT}]")
    return parser.parse_args(words)


def run(small: str, hosts: Sequence[str], out: Path | None = None) -> Report:
    """Do the main job and write the report.

    Args:
        small: The small model.
        hosts: The larger models, at least one.
        out: Folder of the results (default: build/demo, with another small model's name added).
    """
    if len(set(hosts)) < len(hosts):
        raise InputError(f"a host stands twice in {' '.join(hosts)}", hint="name each host once")
    if out is None:
        out = OUT if small == SMALL else OUT.with_name(f"{OUT.name}-{_slug(small)}")
    _say_downloads([small, *hosts])
    job = Job(_fetched(small), tuple(_fetched(host) for host in hosts), out)
    clock, display = Clock(out / "wall_sec.json"), Display()
    functions = _prepare_texts(job)
    _make_adapter(job, clock, display)
    reports, growth = [], ()
    for host in job.hosts:
        opened = _mounted(job, host, clock, display)
        evaluated = _evaluated(job, host, opened, clock, display)
        completions = _completed(job, host, opened, functions, clock, display)
        reports.append(replace(evaluated.report, completions=completions))
        growth = growth or _growth(job, opened, evaluated, clock, display)
    report = merge_hosts(reports)
    report = replace(
        report,
        growth=growth,
        wall_sec=clock.wall_sec,
        settings=_settings(job),
        completions_note=COMPLETIONS_NOTE,
    )
    write_report(report, out)
    print(table(report))
    print(f"report:  {out / 'report.html'}\nadapter: {job.adapter}")
    steps = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in report.wall_sec.items())
    lost = "; more, since a step was killed" if clock.has_lost else ""
    print(f"time:    {sum(report.wall_sec.values()) / 60:.1f} min ({steps}{lost})")
    page, host = out / "playground.html", job.hosts[0].ref
    write_playground(page, reports[0].completions)
    prompt = min(job.test.rglob("*.zig"), key=lambda path: path.stat().st_size)
    print(next_steps(host, job.adapter, prompt, page))
    return report


def _say_downloads(refs: Sequence[str]) -> None:
    lines = []
    if not corpus.is_fetched(TEXTS):
        lines.append(f"{corpus.ZIG_DOWNLOAD_MB:>5} MB  {corpus.ZIG_LICENCE}")
    for ref in dict.fromkeys(refs):
        if ref in models.MODELS:
            if not models.is_fetched(ref):
                lines.append(models.describe(ref))
        elif not ref.startswith("tiny:") and not Path(ref).expanduser().exists():
            lines.append(f"    ? MB  {ref}, from the model hub, under its own licence")
    if lines:
        print("This will be downloaded, and none of it is run as code:", *lines, sep="\n")
        print("Who goes on accepts these terms; Ctrl-C stops.", flush=True)
        if sys.stdout.isatty():
            time.sleep(READING_SEC)


def _fetched(ref: str) -> Model:
    if ref in models.MODELS:
        known = models.MODELS[ref]
        return Model(str(models.fetch_model(ref)), known.title, known.licence)
    return Model(ref, Path(ref).name if Path(ref).expanduser().exists() else ref)


def _prepare_texts(job: Job) -> list[corpus.HeldOutFunction]:
    chosen = corpus.choose(corpus.fetch_zig(TEXTS), CHOICE)
    corpus.write_texts(job.train, chosen["train"])
    corpus.write_texts(job.test, chosen["test"])
    middles = {name: corpus.middle(text) for name, text in chosen["test"].items()}
    corpus.write_texts(job.scored, middles)
    for kind, texts in corpus.general_texts().items():
        corpus.write_texts(job.general / kind, texts)
    return corpus.held_out_functions(chosen["test"], COMPLETIONS)


def _make_adapter(job: Job, clock: Clock, display: Display) -> None:
    """Tune, record and fit: everything that needs no host."""
    expert, recording = job.out / "expert", job.out / "recording"
    with clock.step("tune", expert):
        config = TuneConfig(
            model=job.small.ref,
            data=(str(job.train),),
            against=(str(job.test),),
            out=expert,
            validations=VALIDATIONS,
            seed=SEED,
        )
        print(trimtab.tune(config, progress=display.progress).summary())
    with clock.step("record", recording):
        config = RecordConfig(
            expert=expert, out=recording, general_tokens=GENERAL_TOKENS, seed=SEED
        )
        print(trimtab.record(config, progress=display.progress).summary())
    with clock.step("fit", job.adapter):
        config = FitConfig(
            recording=recording,
            out=job.adapter,
            name="zig",
            epochs=HEAD_EPOCHS,
            data_licence="MIT (Zig's standard library)",
            model_licence=job.small.licence,
            seed=SEED,
        )
        print(trimtab.fit(config, progress=display.progress).summary())


def _suffix(job: Job, host: Model) -> str:
    return "" if len(job.hosts) == 1 else f" on {host.title}"


def _mounted(job: Job, host: Model, clock: Clock, display: Display) -> HFModel:
    """Open a host once for all that follows, and mount the adapter on it."""
    with clock.step(f"mount{_suffix(job, host)}"):
        opened = open_model(host.ref, progress=display.progress)
        config = MountConfig(adapter=job.adapter, host=host.ref, seed=SEED)
        print(trimtab.mount(config, host=opened, progress=display.progress).summary())
    return opened


def _folder(job: Job, host: Model) -> Path:
    return job.out / "hosts" / _slug(host.title)


def _evaluated(
    job: Job, host: Model, opened: HFModel, clock: Clock, display: Display
) -> Evaluation:
    """Measure all rows on one host, under the names that people know."""
    folder = _folder(job, host)
    with clock.step(f"evaluate{_suffix(job, host)}", folder):
        config = _evaluation(job, job.adapter, host, folder)
        found = trimtab.evaluate(config, host=opened, is_named=True, progress=display.progress)
    [result] = found.report.hosts
    named = replace(result, host=host.title, small=job.small.title)
    shown = found.report.tokens_name.removeprefix(f"{job.scored}/")
    return replace(found, report=replace(found.report, hosts=(named,), tokens_name=shown))


def _completed(
    job: Job,
    host: Model,
    opened: HFModel,
    functions: Sequence[corpus.HeldOutFunction],
    clock: Clock,
    display: Display,
) -> tuple[Completion, ...]:
    """Let one host go on after the functions, before and after."""
    with clock.step(f"generate{_suffix(job, host)}"):
        return completed(
            opened, job.adapter, functions, kept=_folder(job, host) / KEPT_NAME, display=display
        )


def _evaluation(
    job: Job, adapter: Path, host: Model, out: Path, rows: tuple[str, ...] = ()
) -> EvaluateConfig:
    return EvaluateConfig(
        adapter=adapter,
        host=host.ref,
        data=(str(job.scored),),
        general=tuple(f"{kind.name}={kind}" for kind in sorted(job.general.iterdir())),
        out=out,
        max_tokens=EVALUATED_TOKENS,
        document_tokens=DOCUMENT_TOKENS,
        rows=rows,
        domain="Zig",
        seed=SEED,
    )


def _growth(
    job: Job, opened: HFModel, whole: Evaluation, clock: Clock, display: Display
) -> tuple[GrowthPoint, ...]:
    """Quality of the memory on the first host: with nothing recorded, with a part, with all.

    Args:
        job: What the run works on.
        opened: The first host.
        whole: The evaluation of the whole adapter on it.
        clock: Times the step.
        display: Shows the work.
    """
    part = job.out / "growth" / "part.adapter"
    with clock.step("growth", part):
        config = FitConfig(
            recording=job.out / "recording",
            out=part,
            carriers=("memory",),
            max_tokens=GROWTH_TOKENS,
            seed=SEED,
        )
        trimtab.fit(config, progress=display.progress)
        config = _evaluation(job, part, job.hosts[0], job.out / "growth" / part.stem, GROWTH_ROWS)
        config = config.model_copy(update={"max_tokens": GROWTH_SCORED_TOKENS, "general": ()})
        found = trimtab.evaluate(config, host=opened, is_named=True, progress=display.progress)
    # The last document of fewer may be cut shorter.
    both = zip(found.scored[""], whole.scored[""], strict=False)
    same = sum(1 for _ in takewhile(lambda kept: _tokens(kept[0]) == _tokens(kept[1]), both))
    of_part, of_whole = (first_documents(one, same, seed=SEED) for one in (found, whole))
    memory = read_manifest(job.adapter, verify=False).memory
    entries = memory.entries if memory else 0
    sizes = (0, min(GROWTH_TOKENS, entries), entries)
    shown = ((of_part, "host"), (of_part, "memory"), (of_whole, "memory"))
    return tuple(
        GrowthPoint(size, {"memory": result.domain[row]}, {"memory": perplexity(result)[row]})
        for size, (result, row) in zip(sizes, shown, strict=True)
    )


def _tokens(kept: Kept) -> Sequence[int]:
    return kept.on_host.token_ids


def _settings(job: Job) -> dict[str, str]:
    return {
        "small model": job.small.title,
        "hosts": ", ".join(host.title for host in job.hosts),
        "domain text": f"{corpus.ZIG_PACKAGE}, {CHOICE.test_files} test files, at most"
        f" {CHOICE.train_bytes:,} bytes of training files, chosen with seed {CHOICE.seed}",
        "completions": "head, memory and expert, greedy",
        "how much text it takes": f"the memory alone, on {GROWTH_SCORED_TOKENS:,} of these tokens",
        "general text": "Moby-Dick, Python's standard library",
        "scored": f"at most {EVALUATED_TOKENS:,} host tokens of domain text,"
        f" {DOCUMENT_TOKENS:,} from the middle of each file",
        "seed": str(SEED),
        "Python": sys.version.split()[0],
    }


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9.]+", "-", name.lower()).strip("-.") or "model"
