"""The workbench of a comparison: data, models and steps that methods share, each done once."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from trimtab.backends.hf import HFModel
from trimtab.backends.open import one_device, resolve_dtype
from trimtab.backends.pair import Pair, open_pair
from trimtab.comparing import sizes
from trimtab.comparing.budget import Budget
from trimtab.comparing.kept import STEPS
from trimtab.comparing.measure import watched
from trimtab.comparing.split import TEST_NAME, TRAIN_NAME, Split, key_of
from trimtab.comparing.values import SCHEMA, Step
from trimtab.config import (
    CompareConfig,
    FitConfig,
    MountConfig,
    RecordConfig,
    TuneConfig,
    TuneMethod,
)
from trimtab.costing import flops
from trimtab.costing.sheet import Shape
from trimtab.errors import InputError
from trimtab.fit import fit
from trimtab.mount import mount
from trimtab.record import record
from trimtab.steering.mounted import Mounted
from trimtab.store.expert import read_expert
from trimtab.store.files import read_json, write_json
from trimtab.text.corpus import sha256_of_documents
from trimtab.tune import tune
from trimtab.tuning.rates import most_trial_tokens
from trimtab.types import Advance, Document, Progress
from trimtab.unembedding import weight_sha256

SAVE_EVERY_SEC = 15.0
"""A killed run loses at most so much of the time that a step has taken."""

ADAPTER, LABEL_ADAPTER = "domain.adapter", "label-head.adapter"

_FREE = {"out", "budget", "memory_gb", "methods", "price", "small", "host"}
"""Settings that change no result; of models not their names count, but what they are."""

_VALUES = 256
"""Of a weight that name it."""

_MEASURED = {
    *("test_tokens", "document_tokens", "window_tokens", "task_questions"),
    *("examples", "few_shot_tokens", "context_tokens"),
}
"""Settings that change what is measured and not what is learnt."""


@dataclass(frozen=True)
class Bench:
    """What all methods work on.

    Attributes:
        config: What is compared, and how.
        split: The data.
        texts: Test text under the empty kind, and general text by kind, cut for the host.
        host: The host.
        models: Names what small model and host are (`model_key`).
        host_shape: Its sizes.
        small_shape: Sizes of the small model.
        budget: Time and memory.
        progress: Shows the work.
        seated: Adapters that this run has mounted, by name.
    """

    config: CompareConfig
    split: Split
    texts: Mapping[str, Sequence[Document]]
    host: HFModel
    models: str
    host_shape: Shape
    small_shape: Shape
    budget: Budget
    progress: Progress
    seated: dict[str, Mounted] = field(default_factory=dict, repr=False)

    @property
    def folder(self) -> Path:
        """Folder of the comparison."""
        return self.config.out

    @cached_property
    def test_tokens(self) -> int:
        """Host tokens of all text that is scored."""
        texts = (d.text for documents in self.texts.values() for d in documents)
        return sum(len(self.host.encode(text)) for text in texts)

    @cached_property
    def train_tokens(self) -> float:
        """Tokens of the training text that a training goes through, predicted by its bytes."""
        size = sum(len(document.text.encode()) for document in self.split.train)
        test = sum(len(d.text.encode()) for found in self.texts.values() for d in found)
        # Tune holds out a tenth of the documents.
        tokens = 0.9 * size * self.test_tokens / max(test, 1)
        return min(tokens, self.config.train_tokens or tokens) * self.config.epochs

    @property
    def lora_tokens(self) -> float:
        """Tokens that a LoRA is trained on at most, predicted, with trials of its learning rate."""
        return self.train_tokens + most_trial_tokens(self.train_tokens / self.config.epochs)

    @cached_property
    def general_tokens(self) -> int:
        """Host tokens of the general text that the adapter is told to leave alone."""
        return sum(len(self.host.encode(document.text)) for document in self.split.general_train)

    @property
    def recorded_tokens(self) -> float:
        """Tokens that are recorded, predicted: training text once, and general text."""
        return self.train_tokens / self.config.epochs + self.general_tokens

    @property
    def read_tokens(self) -> float:
        """Tokens that recording reads, predicted: both models read the training text."""
        return self.recorded_tokens + self.train_tokens / self.config.epochs

    @property
    def copy_bytes(self) -> int:
        """Bytes of the copy of each weight that mixed precision keeps in training; 0 without it."""
        arithmetic = resolve_dtype(self.config.dtype, one_device())
        return 0 if arithmetic is torch.float32 else arithmetic.itemsize

    def guarded(self, work: str) -> Progress:
        """Progress of work that ends where the budget would not suffice for the rest of it."""
        return self.budget.guarded(self.progress, work)

    def step(
        self, name: str, work: Callable[[Progress], float], *, serves_all_hosts: bool = False
    ) -> Step:
        """Do a piece of work unless it is done, and say what it took.

        What an interrupted attempt took counts too.

        Args:
            name: Of the step; one of the folder `steps`.
            work: Does it under a progress display, and says how many operations it was.
            serves_all_hosts: Whether it is done once, whatever the number of hosts.

        Raises:
            NotRun: The budget does not suffice for the rest of it; the next run goes on from there.
        """
        path, kept = self._step_path(name), self._kept_step(name)
        if "step" in kept:
            return Step.model_validate(kept["step"])
        before, used_before = (float(kept.get(unit, 0.0)) for unit in ("sec", "cpu_sec"))
        started, used = time.perf_counter() - before, time.process_time() - used_before

        def save() -> None:
            took = {"sec": time.perf_counter() - started, "cpu_sec": time.process_time() - used}
            write_json(path, {"key": self._step_key(name), **took})

        try:
            with watched() as watch:
                needed = work(_telling(self.guarded(name), save))
        finally:
            # However it ends, by Ctrl-C above all: the next attempt goes on from here.
            save()
        watch.sec += before
        watch.cpu_sec += used_before
        done = watch.step(name, needed, serves_all_hosts=serves_all_hosts)
        write_json(path, {"key": self._step_key(name), "step": done.model_dump(mode="json")})
        return done

    def done(self, name: str) -> Step | None:
        """A step that is done, with what it took; None where it is not."""
        kept = self._kept_step(name)
        return Step.model_validate(kept["step"]) if "step" in kept else None

    def has_begun(self, name: str) -> bool:
        """Whether a step is done, or was once interrupted."""
        return bool(self._kept_step(name))

    def _kept_step(self, name: str) -> Mapping[str, Any]:
        path = self._step_path(name)
        kept = read_json(path, "step") if path.is_file() else {}
        return kept if kept.get("key") == self._step_key(name) else {}

    def _step_key(self, name: str) -> str:
        return key_of(self._learnt_key, name)

    def _step_path(self, name: str) -> Path:
        return self.folder / STEPS / f"{name}.json"

    @property
    def key(self) -> str:
        """Names data, models and settings; not the budget, nor which methods are asked for."""
        settings = self.config.model_dump(mode="json", exclude=_FREE)
        return key_of(settings, self.split.sha256, self.models)

    @cached_property
    def _learnt_key(self) -> str:
        """Names what methods learn from, and how; not what they are measured on."""
        settings = self.config.model_dump(mode="json", exclude=_FREE | _MEASURED)
        texts = (self.split.train, self.split.test, self.split.general_train)
        named = [sha256_of_documents(documents) for documents in texts]
        return key_of(SCHEMA, settings, named, self.models)

    def check_steps(self) -> None:
        """Refuse a folder whose steps are others': done again, they would seem to take no time.

        Raises:
            InputError: One was taken with other data, models or training, or by another version.
        """
        for path in sorted((self.folder / STEPS).glob("*.json")):
            if read_json(path, "step").get("key") != self._step_key(path.stem):
                raise InputError(
                    f"the comparison in {self.folder} has learnt with other data, models or"
                    f" training than asked for now, or in another version ({STEPS}/{path.name})",
                    hint="give another folder in --out, or delete this one to begin anew",
                )

    # Every step below is one of Trimtab's verbs in a folder of its own, which goes on where it was.

    def _tuned(self, model: str, name: str, method: TuneMethod, progress: Progress) -> Path:
        config = TuneConfig.model_validate(
            {
                "model": model,
                "data": (str(self.folder / "data" / TRAIN_NAME),),
                "out": self.folder / name,
                "method": method,
                "rank": self.config.rank,
                "epochs": self.config.epochs,
                "max_tokens": self.config.train_tokens,
                "window_tokens": self.config.train_window_tokens,
                "against": (str(self.folder / "data" / TEST_NAME),),
                "dtype": self.config.dtype,
                "seed": self.config.seed,
            }
        )
        tune(config, progress=progress)
        return config.out

    def tune_step(self, model: str, name: str, shape: Shape, method: TuneMethod = "lora") -> Step:
        """Tune a model on the training text; the operations follow from the tokens of it."""

        def work(progress: Progress) -> float:
            folder = self._tuned(model, name, method, progress)
            tokens, window = read_expert(folder).all_train_tokens, self.config.train_window_tokens
            if method == "full":
                return sizes.full_flops(shape, tokens, window)
            return sizes.lora_flops(shape, tokens, window, self.config.rank)

        step = self.step(f"tune {name}", work, serves_all_hosts=model == self.config.small)
        self.budget.training = self.budget.training or step.flops / max(step.sec, 1e-9)
        return step

    def record_step(self) -> Step:
        """Record expert and reference over the training text and general text."""

        def work(progress: Progress) -> float:
            config = RecordConfig(
                expert=self.folder / "expert",
                out=self.folder / "recording",
                general=(str(self.folder / "data" / "general.jsonl"),),
                dtype=self.config.dtype,
                # Time and memory are measured of this process.
                processes=1,
                seed=self.config.seed,
            )
            done = record(config, progress=progress)
            return done.read_tokens * flops.hidden_flops(self.small_shape, 256)

        return self.step("record", work, serves_all_hosts=True)

    def fit_step(self, name: str, *, labels: bool = False) -> Step:
        """Fit the adapter, or the control: a head on the host that follows the text's tokens."""
        settings: dict[str, object] = {
            "recording": self.folder / "recording",
            "out": self.folder / name,
            "dtype": self.config.dtype,
            "seed": self.config.seed,
        }
        if labels:
            settings |= {"carriers": ("head",), "host": self.config.host, "targets": "labels"}
        config = FitConfig.model_validate(settings)

        def work(progress: Progress) -> float:
            fit(config, progress=progress)
            return self.fit_flops(labels=labels)

        return self.step(f"fit {name}", work, serves_all_hosts=not labels)

    def fit_flops(self, *, labels: bool = False) -> float:
        """Operations of fitting a head with the default settings, and of what the host reads."""
        settings = FitConfig(recording=self.folder / "recording", out=self.folder / ADAPTER)
        shape = self.host_shape if labels else self.small_shape
        most = flops.ACTIVE if labels else flops.COMPARED
        compared = min(most, shape.vocab)
        head = flops.HeadFit(
            self.recorded_tokens, shape.hidden, compared, settings.rank, settings.epochs
        )
        read = self.recorded_tokens * flops.hidden_flops(shape, 256) if labels else 0.0
        return flops.head_fit_flops(head) + read

    def hidden_and_logits(self, token_ids: Sequence[int]) -> None:
        """Let the host read some tokens, as scoring does."""
        with torch.inference_mode():
            states = self.host.hidden(torch.tensor([list(token_ids)], device=self.host.device))
            # A GPU has done it only when a number is asked for.
            float(self.host.unembedding.logits(states[0])[-1, -1])

    def mounted(self, name: str) -> Mounted:
        """Seat an adapter on the host, unless this run has done so."""
        if name not in self.seated:
            self.seated[name] = self._mounted(name, self.guarded("mounting"), cache=True)
        return self.seated[name]

    def _mounted(self, name: str, progress: Progress, *, cache: bool) -> Mounted:
        config = MountConfig(
            adapter=self.folder / name, host=self.config.host, dtype=self.config.dtype, cache=cache
        )
        return mount(config, host=self.host, progress=progress)

    def mount_step(self, name: str) -> Step:
        """Seat an adapter on the host, and say what that took."""

        def work(progress: Progress) -> float:
            # What other runs have kept of this host would make it look cheaper than it is.
            self.seated[name] = self._mounted(name, progress, cache=False)
            return self.mount_flops if self.seated[name].paired_positions else 0.0

        return self.step(f"mount {name}", work)

    @property
    def mount_flops(self) -> float:
        """Operations of the host's pass over the adapter's general text."""
        return self.general_tokens * flops.hidden_flops(self.host_shape, 256)

    @contextmanager
    def tuned_model(self, name: str) -> Iterator[HFModel]:
        """A tuned model, opened from its folder."""
        with self.pair(name).as_expert() as model:
            yield replace(model, ref=f"{model.ref} ({name})")

    def pair(self, name: str) -> Pair:
        """A tuned model and the one that it was before."""
        return open_pair(self.folder / name, dtype=self.config.dtype, progress=self.progress)


def model_key(model: HFModel) -> str:
    """Name a model by what it is, wherever it lies and whatever it is called.

    Its head and vocabulary count as a whole, of every other weight some evenly spaced values:
    training moves nearly all of them.
    """
    weights = {
        name: weight_sha256(weight.flatten()[:: weight.numel() // _VALUES + 1][None])
        for name, weight in model.model.state_dict().items()
    }
    settings = model.model.config.to_dict()
    for name in ("_name_or_path", "transformers_version"):
        settings.pop(name, None)
    return key_of(model.fingerprint, sorted(weights.items()), sorted(settings.items()))


def _telling(progress: Progress, save: Callable[[], None]) -> Progress:
    """A progress display that saves now and then, which a killed process cannot at its end."""
    saved = time.monotonic()

    @contextmanager
    def display(label: str, total: int) -> Iterator[Advance]:
        with progress(label, total) as advance:

            def told(units: int) -> None:
                nonlocal saved
                advance(units)
                if time.monotonic() - saved >= SAVE_EVERY_SEC:
                    save()
                    saved = time.monotonic()

            yield told

    return display
