"""Making and mounting an adapter, timed: record, mount, fit, and LoRA on the host beside them."""

import math
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, final
from unittest.mock import patch

import torch
from torch import Tensor
from transformers import PreTrainedModel

import trimtab
from bench.speed.models import LORA_RANK, Models
from bench.speed.roofline import Size, Work
from bench.speed.timing import Figure, Stopwatch, timed
from trimtab import FitConfig, MountConfig, RecordConfig, TuneConfig
from trimtab.backends.pair import Pair
from trimtab.costing import flops
from trimtab.costing.sheet import Shape
from trimtab.errors import InputError
from trimtab.mount import mount
from trimtab.soft_targets import run_reference
from trimtab.store.expert import HELD_OUT_NAME, TRAIN_NAME
from trimtab.store.home import HOME_VARIABLE
from trimtab.store.recording import Recording
from trimtab.store.recording_schema import EXPERT_SPLITS
from trimtab.text.corpus import load_documents
from trimtab.text.passages import cut_shards, tokenised
from trimtab.text.probe import probe_documents

CLI_TURNS = 7
WINDOW_TOKENS = 256
"""Of a step of training, with `tune`'s own settings."""


@dataclass(frozen=True)
class Recorded:
    """What recording has come to.

    Attributes:
        ratio: Of its throughput to that of the two forward passes alone, in the same turn.
        sec_per_token: Of recording, for each token that a model reads.
        tokens: Recorded in each turn, those that both models read counted twice.
        positions: That the two models have read for them, padding and overlap included.
        bytes_per_token: Of training text, on disk.
    """

    ratio: Figure
    sec_per_token: Figure
    tokens: int
    positions: int
    bytes_per_token: float


@dataclass(frozen=True)
class Training:
    """What a step of training takes: as `tune` takes it, one window of WINDOW_TOKENS.

    Attributes:
        small: Of the small model, which becomes the expert.
        host: Of the host.
    """

    small: Figure
    host: Figure


@final
class Stages:
    """The stages of one pair; each is measured when it is first asked for."""

    def __init__(self, models: Models, scratch: Path) -> None:
        """Measure nothing yet.

        Args:
            models: Of the pair.
            scratch: Folder for what is made in order to be timed.
        """
        self._models = models
        self._material = models.material
        self._settings = models.material.settings
        self._scratch = scratch

    @contextmanager
    def _folder(self) -> Iterator[Path]:
        self._scratch.mkdir(parents=True, exist_ok=True)
        path = Path(tempfile.mkdtemp(dir=self._scratch))
        try:
            yield path
        finally:
            shutil.rmtree(path, ignore_errors=True)

    @cached_property
    def record(self) -> Recorded:
        """Record, and run the same passes over the same windows, in turns.

        What is compared is the recording of tokens, from the first pass to the last byte on disk;
        both models are open by then.
        """
        pair = self._models.pair
        *passes, rows = self._passes(pair)
        turns, tokens, size = [], 0, 0.0
        for number in range(self._settings.repetitions):
            before_sec = timed(partial(_bare_passes, pair, *passes)) if number % 2 == 0 else 0.0
            with self._folder() as folder:
                watch = Stopwatch()
                done = trimtab.record(self._record_config(folder / "r"), progress=watch.progress)
            # Before or after, in turns.
            bare_sec = before_sec or timed(partial(_bare_passes, pair, *passes))
            turns.append((bare_sec, watch.sec("recording (tokens, each model's)")))
            tokens, size = done.read_tokens, done.bytes_per_token
        if tokens != rows:
            raise InputError(
                f"record read {tokens} tokens, and the passes beside it {rows}",
                hint="bring `_passes` into line with `trimtab.record`",
            )
        return Recorded(
            Figure.of([bare_sec / ours_sec for bare_sec, ours_sec in turns]),
            Figure.of([ours_sec / tokens for _, ours_sec in turns]),
            tokens,
            sum(ids.numel() for ids in [*passes[0], *passes[1]]),
            size,
        )

    def _record_config(self, out: Path) -> RecordConfig:
        return RecordConfig(
            expert=self._material.expert,
            out=out,
            max_tokens=self._settings.row_tokens,
            general_tokens=self._settings.row_tokens // 4,
        )

    def _passes(self, pair: Pair) -> tuple[list[Tensor], list[Tensor], int]:
        """The passes of the reference and of the expert, as `record` lays them out.

        Returns:
            The token ids of each pass, padding included, of either model; and the tokens that are
            kept of all these.
        """
        config, rows = self._record_config(Path()), 0
        seen: list[Tensor] = []
        of_expert: list[Tensor] = []

        def note(_module: Any, _args: Any, given: dict[str, Any]) -> None:
            seen.append(given["input_ids"])

        trunk: Any = pair.reference.model.base_model
        handle = trunk.register_forward_pre_hook(note, with_kwargs=True)
        limits = {"held_out": None, "train": None, "general": config.general_tokens}
        texts = {
            "held_out": load_documents(config.expert / HELD_OUT_NAME),
            "train": load_documents(config.expert / TRAIN_NAME),
            "general": probe_documents(),
        }
        if config.max_tokens:
            limits["held_out"] = config.max_tokens // 5
        try:
            for name, documents in texts.items():
                tokens = tokenised(
                    documents,
                    lambda document: pair.reference.encode(document.text, markup=document.markup),
                    max_tokens=limits[name],
                    seed=config.seed,
                )
                if name == "held_out" and config.max_tokens:
                    limits["train"] = config.max_tokens - sum(len(one.token_ids) for one in tokens)
                kept, before = 0, len(seen)
                for shard in cut_shards(
                    tokens,
                    window=config.window_tokens,
                    stride=config.stride_tokens,
                    shard_tokens=config.shard_tokens,
                ):
                    kept += len(
                        run_reference(pair.reference, tokens, shard, advance=lambda _: None)
                    )
                rows += kept
                if name in EXPERT_SPLITS:
                    of_expert += seen[before:]
                    rows += kept
        finally:
            handle.remove()
        return seen, of_expert, rows

    @cached_property
    def mount(self) -> tuple[Figure, float]:
        """Seat head and memory, and how long the host's pass over the probe text takes beside.

        That pass is made once for each host and kept; all else is done anew each time, from the
        reading of the adapter and the fingerprint of the host on. In a home of its own the first
        seating, which warms up, makes that pass, whatever else the machine has mounted before.
        """
        host, adapter = self._models.host, self._material.adapter
        samples, probe_secs = [], []
        with self._folder() as home, patch.dict(os.environ, {HOME_VARIABLE: str(home)}):
            for number in range(self._settings.repetitions + 1):
                config = MountConfig(
                    adapter=adapter, host=self._material.host_ref, seed=1_000 + number
                )
                # A host of the same weights that has kept nothing of itself.
                fresh, watch = replace(host), Stopwatch()
                sec = timed(partial(mount, config, host=fresh, progress=watch.progress))
                probe_secs.append(watch.sec("reading the probe text"))
                samples.append(sec - probe_secs[-1])
        return Figure.of(samples[1:]), probe_secs[0]

    @cached_property
    def fit(self) -> Figure:
        """Fit head and memory to the long recording, once."""
        recording = self._material.long_recording(self._models.small)
        self._models.close()
        with self._folder() as folder:
            config = FitConfig(
                recording=recording,
                out=folder / "fit.adapter",
                carriers=("head", "memory"),
                anchors=self._settings.anchors,
            )
            progress = self._material.display.progress
            return Figure.of([timed(lambda: trimtab.fit(config, progress=progress))])

    @cached_property
    def training(self) -> Training:
        """Steps of LoRA on the host and on the small model, in turns."""
        self._models.close()
        steps: dict[str, list[float]] = {"small": [], "host": []}
        refs = {"small": self._material.small_ref, "host": self._material.host_ref}
        label, display = "training (turns)", self._material.display
        with display.progress(label, self._settings.repetitions * len(refs)) as advance:
            for _ in range(self._settings.repetitions):
                for name, ref in refs.items():
                    steps[name] += self._steps_sec(ref)
                    advance(1)
        return Training(Figure.of(steps["small"]), Figure.of(steps["host"]))

    def _steps_sec(self, ref: str) -> list[float]:
        """Seconds of each step but the first, without validation or checkpoints."""
        watch, count = Stopwatch(), self._settings.lora_steps + 1
        with self._folder() as folder:
            config = TuneConfig(
                model=ref,
                data=(str(self._material.train_text),),
                out=folder / "expert",
                max_tokens=count * WINDOW_TOKENS,
                window_tokens=WINDOW_TOKENS,
                rank=LORA_RANK,
                held_out=0,
                checkpoint_every_sec=1e9,
            )
            trimtab.tune(config, progress=watch.progress)
        return watch.steps_sec("tuning (tokens)")

    def training_sec(self, step: Figure) -> Figure:
        """One pass over the tokens of the rows of fit: as many equal steps as it has windows."""
        return step.times(math.ceil(self._settings.fit_tokens / WINDOW_TOKENS))

    def pipeline_sec(self) -> Figure:
        """Tune, record (with the general text) and fit, on those tokens."""
        read = 2 * self._settings.fit_tokens + self._general_tokens()
        recorded = self.record.sec_per_token.times(read)
        tuned = self.training_sec(self.training.small)
        return tuned.plus(recorded).plus(self.fit)

    def _general_tokens(self) -> int:
        recording = Recording.open(self._material.recording, verify=False)
        return recording.manifest.splits["general"].tokens

    def fit_work(self, small: PreTrainedModel) -> Work:
        """Operations of the head's and the memory's fit, as the cost model counts them."""
        tokens, shape = self._settings.fit_tokens, shape_of(small)
        head = flops.HeadFit(tokens + self._general_tokens(), shape.hidden)
        asked = sum(
            min(split.tokens, 4_096)
            for name, split in Recording.open(
                self._material.recording, verify=False
            ).manifest.splits.items()
            if name != "train"
        )
        memory = flops.memory_fit_flops(flops.MemoryFit(tokens, asked), shape)
        return Work(flops=flops.head_fit_flops(head) + memory)

    def mount_work(self, small: PreTrainedModel, host: PreTrainedModel) -> Work:
        """Operations of the map and its calibration."""
        probe = self._general_tokens()
        needed = flops.map_flops(self._settings.anchors, shape_of(small), shape_of(host), probe)
        return Work(flops=needed)


@torch.inference_mode()
def _bare_passes(pair: Pair, of_reference: list[Tensor], of_expert: list[Tensor]) -> None:
    """The forward passes alone, up to the hidden states."""
    for ids in of_reference:
        pair.reference.model.base_model(input_ids=ids, use_cache=False)
    with pair.as_expert() as expert:
        for ids in of_expert:
            expert.model.base_model(input_ids=ids, use_cache=False)


def record_work(pair: Pair, recorded: Recorded) -> Work:
    """Operations of a model's pass up to the hidden states, for each token that it reads."""
    size = Size.of(pair.reference.model)
    head = pair.reference.unembedding.weight.numel()
    position = 2.0 * (size.weights - head) + WINDOW_TOKENS * size.attention_flops
    return Work(flops=position * recorded.positions / recorded.tokens)


def shape_of(model: PreTrainedModel) -> Shape:
    """A model's sizes, as the cost model names them."""
    config: Any = model.config.get_text_config(decoder=True)
    heads = config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    return Shape(
        name="",
        params=float(sum(weight.numel() for weight in model.parameters())),
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        attention=heads * width,
        key_value=(getattr(config, "num_key_value_heads", None) or heads) * width,
        feed_forward=config.intermediate_size,
        vocab=config.vocab_size,
        tied=bool(config.tie_word_embeddings),
        address="",
    )


def cli_help() -> Figure:
    """`trimtab --help` over what any command of its kind takes: Python's start and typer's import.

    Both are run once before, so that what lies on disk is read.
    """
    asked = [sys.executable, "-m", "trimtab", "--help"]
    least = [sys.executable, "-c", "import typer"]

    def run(command: list[str]) -> float:
        return timed(lambda: subprocess.run(command, check=True, capture_output=True))

    run(asked), run(least)
    return Figure.of([run(asked) / run(least) for _ in range(CLI_TURNS)])
