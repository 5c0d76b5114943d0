"""Which rows are measured together, and what each comes to."""

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.speed.decoding import HOST, SMALL, Tally, Way, ratio, take_turns, ways_of, work_of
from bench.speed.material import Material
from bench.speed.models import Models
from bench.speed.results import Outcome
from bench.speed.roofline import Size
from bench.speed.rows import DECODING, DEMO_ROW, PAIRS, Pair, Settings
from bench.speed.stages import CLI_TURNS, WINDOW_TOKENS, Stages, cli_help, record_work
from bench.speed.timing import Figure
from trimtab.progress import Display

Keep = Callable[[Mapping[str, Outcome]], None]
"""Told of rows as soon as they are known; again, where later repetitions add to them."""

NOTES = {
    "head": "",
    "memory-1m": "keys are {entries:,} real ones repeated with noise, text and its places are"
    " real; found by the nearest lists of keys, and by bytes",
    "head+memory-1m": "the memory of the row memory-1m",
    "live-plain": "",
    "live-speculative": "at most {draft_tokens} tokens drafted, fewer where the expert is unsure",
    "lockstep-proxy": "greedy, alpha 1, key-value caches, logits over the whole vocabulary",
    "assisted": "the untuned small model drafts for the unsteered host, with transformers' own"
    " settings",
    "peft-lora": "rank 16 on all linear layers but the head, beside the weights; merged into them"
    " it would cost nothing, and serve one text only",
}


@dataclass(frozen=True)
class Asked:
    """What is to be measured.

    Attributes:
        rows: Names, in the order of the table.
        pair: Of all rows but the demo's.
        settings: How much.
        folder: Where what is made is kept.
        display: Shows progress.
    """

    rows: Sequence[str]
    pair: Pair
    settings: Settings
    folder: Path
    display: Display

    def material(self, pair: Pair, *, quick: bool) -> Material:
        """A pair's own folder; quick runs have another one."""
        folder = self.folder / f"{pair.name}{'-quick' if quick else ''}"
        return Material(pair, self.settings, folder, self.display)


def measure(asked: Asked, keep: Keep, *, quick: bool) -> None:
    """Measure rows, cheap ones first, and tell of each as soon as it is known."""
    if "cli-help" in asked.rows:
        figure = cli_help()
        keep({"cli-help": Outcome(figure, "", "python -m trimtab --help", figure, CLI_TURNS)})
    if DEMO_ROW in asked.rows:
        demo = asked.pair if asked.pair.name == "tiny" else PAIRS["demo"]
        models = Models(asked.material(demo, quick=quick))
        _decode(
            models, ["live-speculative"], lambda found: keep({DEMO_ROW: found["live-speculative"]})
        )
        models.close()
    models = Models(asked.material(asked.pair, quick=quick))
    together = [name for name in DECODING if name in asked.rows]
    if together:
        _decode(models, together, keep)
    stages = Stages(models, asked.folder / "scratch")
    for name, found in _staged(stages, models, asked):
        keep({name: found})
    models.close()


def _decode(models: Models, names: Sequence[str], keep: Keep) -> None:
    extra = [SMALL] if "live-plain" in names else []
    ways = {way.name: way for way in ways_of(models, [*names, *extra])}

    def known(tallies: Mapping[str, Tally]) -> None:
        keep({name: _outcome(models, ways[name], tallies) for name in names})

    take_turns(models, list(ways.values()), after_each=known)


def _outcome(models: Models, way: Way, tallies: Mapping[str, Tally]) -> Outcome:
    settings, tally, host = models.material.settings, tallies[way.name], tallies[HOST]
    context = settings.prompt_tokens + settings.new_tokens / 2
    host_work = Size.of(models.host.model).passes(1, 1, context)
    passes = {name: tally.per_token(name)[0] for name in way.sizes}
    more: dict[str, Any] = {
        "host_must_move_bytes": host_work.bytes,
        "host_must_compute_flops": host_work.flops,
        "host_sec_per_token": statistics.median(host.sec_per_token),
        "first_token_sec": statistics.median(tally.first_sec),
        "host_first_token_sec": statistics.median(host.first_sec),
        "passes_per_token": passes,
        "tokens": tally.tokens,
        "same_text_as_host": tally.texts == host.texts,
    }
    if way.name == "live-speculative" and "live-plain" in tallies:
        more["same_text_as_plain"] = tally.texts == tallies["live-plain"].texts
    if way.name == "live-plain":
        more["small_over_host"] = ratio(tallies[SMALL], host).value
    note = NOTES[way.name].format(
        entries=settings.memory_entries, draft_tokens=settings.draft_tokens
    )
    return Outcome(
        ratio(tally, host),
        models.material.pair.name,
        note,
        Figure.of(tally.sec_per_token),
        len(tally.sec_per_token),
        work_of(way, tally, context),
        more,
    )


def _staged(stages: Stages, models: Models, asked: Asked) -> Iterator[tuple[str, Outcome]]:
    """Rows that are no decoding, in an order that opens each model as seldom as can be."""
    made: dict[str, Callable[[], Outcome]] = {
        "mount": lambda: _mount(stages, models),
        "record": lambda: _record(stages, models),
        "pipeline-over-lora": lambda: _pipeline(stages, models),
        "fit": lambda: _fit(stages, models),
        "fit-over-lora": lambda: _fit_over_lora(stages, models),
    }
    for name, row in made.items():
        if name in asked.rows:
            yield name, row()


def _record(stages: Stages, models: Models) -> Outcome:
    found = stages.record
    note = (
        f"exact recording, {found.bytes_per_token:,.0f} bytes a training token, against the same"
        f" windows: {found.tokens:,} tokens, those that both models read counted twice, in"
        f" {found.positions / found.tokens:.2f} positions each (context and padding)"
    )
    work, times = record_work(models.pair, found), models.material.settings.repetitions
    return Outcome(found.ratio, models.material.pair.name, note, found.sec_per_token, times, work)


def _mount(stages: Stages, models: Models) -> Outcome:
    work = stages.mount_work(models.small.model, models.host.model)
    (figure, probe_sec), settings = stages.mount, models.material.settings
    note = (
        f"{settings.anchors:,} anchors, vocabulary"
        f" {len(models.host.vocabulary):,} x {models.host.unembedding.weight.shape[1]}, with head"
        " and memory, without the opening of the host and without its pass over the probe text"
        " (probe_sec), which is made once for each host and kept"
    )
    more, times = {"probe_sec": probe_sec}, settings.repetitions
    return Outcome(figure, models.material.pair.name, note, figure, times, work, more)


def _fit(stages: Stages, models: Models) -> Outcome:
    work, settings = stages.fit_work(models.small.model), models.material.settings
    note = f"{settings.fit_tokens:,} tokens of real text under recorded states drawn at random"
    return Outcome(stages.fit, models.material.pair.name, note, stages.fit, 1, work)


def _fit_over_lora(stages: Stages, models: Models) -> Outcome:
    figure = stages.fit.over(stages.training_sec(stages.training.host))
    times = models.material.settings.repetitions
    return Outcome(figure, models.material.pair.name, _lora_note(models), stages.fit, times)


def _pipeline(stages: Stages, models: Models) -> Outcome:
    sec = stages.pipeline_sec()
    training = stages.training
    figure = sec.over(stages.training_sec(training.host))
    more = {
        "small_step_sec": training.small.value,
        "host_step_sec": training.host.value,
        "record_sec_per_read_token": stages.record.sec_per_token.value,
        "fit_sec": stages.fit.value,
    }
    times = models.material.settings.repetitions
    return Outcome(figure, models.material.pair.name, _lora_note(models), sec, times, None, more)


def _lora_note(models: Models) -> str:
    settings = models.material.settings
    return (
        f"{settings.fit_tokens:,} tokens; a pass of LoRA (and of tune) is so many equal steps of"
        f" {WINDOW_TOKENS} tokens, of which {settings.repetitions * settings.lora_steps} were timed"
    )
