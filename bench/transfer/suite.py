"""One run of the transfer suite: a pair on a domain with a seed, step by step, resumable.

Every step is one of Trimtab's verbs in a folder of its own: an interrupted run goes on where it
was, and steps can be left for later.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import trimtab
from bench.transfer.domains import DOMAINS, lay_out
from bench.transfer.pairs import Pair, folder_name, model_ref
from trimtab import EvaluateConfig, FitConfig, RecordConfig, TuneConfig
from trimtab.backends.hf import HFModel
from trimtab.evaluate import Evaluation
from trimtab.progress import Display
from trimtab.store.files import read_json

FOLDER = Path("build/transfer")
"""Of all runs, unless another is named."""


@dataclass(frozen=True)
class Run:
    """What one run works on.

    Attributes:
        pair: The models.
        domain: Name of the domain.
        seed: Seed of the split and of all training.
        base: Folder of all runs. Those of one text share it, those of one small model share expert,
            recording and adapter, which steers all their hosts, and those of one host its LoRAs.
        test_tokens: Score at most this many host tokens of test text.
        view: Which part of the test texts is scored: `test`, or `beginnings` where the domain's
            test documents are the middles of their texts.
        scores_general: Whether general text is scored too.
        train_bytes: How much text is there to learn from (default: the domain's budget).
    """

    pair: Pair
    domain: str
    seed: int
    base: Path
    test_tokens: int
    view: str = "test"
    scores_general: bool = True
    train_bytes: int | None = None

    @property
    def texts(self) -> Path:
        """Where the run's texts lie."""
        return self._folder_of("texts")

    @property
    def folder(self) -> Path:
        """Where everything lies that needs no host."""
        return self._folder_of(folder_name(self.pair.small))

    def _folder_of(self, what: str) -> Path:
        name = f"seed{self.seed}" + (f"-{self.train_bytes}-bytes" if self.train_bytes else "")
        return self.base / what / self.domain / name

    @property
    def adapter(self) -> Path:
        """The adapter."""
        return self.folder / "domain.adapter"

    @property
    def on_host(self) -> Path:
        """Where everything lies that is made with the host or measured on it."""
        return self.folder / "hosts" / self.pair.name

    def lora(self, model: str, display: Display, rate: float | None = None) -> Path:
        """LoRA on a model at a learning rate, or at the one that `tune` finds; its folder."""
        out = self._folder_of(folder_name(model)) / "lora" / (f"{rate:g}" if rate else "tried")
        return self.tuned(model, out, display, learning_rate=rate)

    def tuned(self, model: str, out: Path, display: Display, **settings: float | None) -> Path:
        """Tune a model on the training text, unless it is done; the expert's folder."""
        config = TuneConfig(
            model=model_ref(model),
            data=(str(self.texts / "train"),),
            against=(str(self.texts / "test"), str(self.texts / "validation")),
            out=out,
            seed=self.seed,
        ).model_copy(update=settings)
        print(trimtab.tune(config, progress=display.progress).summary(), flush=True)
        return config.out

    def evaluated(
        self,
        name: str,
        rows: Sequence[str],
        display: Display,
        *,
        adapter: Path | None = None,
        host: HFModel | None = None,
        host_keys: bool = False,
    ) -> Evaluation:
        """Score rows on test text, and on general text if that is wanted, unless they are."""
        kinds = sorted((self.texts / "general").iterdir()) if self.scores_general else []
        config = EvaluateConfig(
            adapter=adapter or self.adapter,
            host=model_ref(self.pair.host),
            data=(str(self.texts / self.view),),
            general=tuple(f"{kind.name}={kind}" for kind in kinds),
            out=self.on_host / "scores" / self.view / name,
            max_tokens=self.test_tokens,
            rows=tuple(rows),
            host_keys=host_keys,
            domain=self.domain,
            seed=self.seed,
        )
        return trimtab.evaluate(config, host=host, progress=display.progress)

    def asked(
        self,
        name: str,
        tasks: Sequence[Path],
        rows: Sequence[str],
        display: Display,
        host: HFModel | None = None,
    ) -> Mapping[str, Mapping[str, list[bool]]]:
        """Whether rows answer each question of some task files rightly, by task and row."""
        config = EvaluateConfig(
            adapter=self.adapter,
            host=model_ref(self.pair.host),
            tasks=tuple(tasks),
            out=self.on_host / "answers" / name,
            rows=tuple(rows),
            seed=self.seed,
        )
        trimtab.evaluate(config, host=host, progress=display.progress)
        found: dict[str, dict[str, list[bool]]] = {}
        for row in rows:
            by_task = read_json(config.out / "tasks" / f"{row}.json", "answers")["tasks"]
            for task, answers in by_task.items():
                right = [sample["metrics"]["acc"] == 1 for sample in answers["samples"]]
                found.setdefault(task, {})[row] = right
        return found


def lay_out_texts(run: Run) -> None:
    """Make the run's texts lie in its folder."""
    domain = DOMAINS[run.domain]
    budget = domain.budget
    if run.train_bytes:
        budget = replace(budget, train_bytes=run.train_bytes)
    lay_out(domain, run.texts, seed=run.seed, budget=budget)


def prepare(run: Run, display: Display) -> None:
    """Texts, expert, recording and adapter: everything that needs no host."""
    lay_out_texts(run)
    make_adapter(run, display)


def make_adapter(run: Run, display: Display) -> None:
    """Expert, recording and adapter from texts that are laid out."""
    adapter_of(run, run.lora(run.pair.small, display), display)


def adapter_of(run: Run, expert: Path, display: Display) -> None:
    """Recording and adapter of an expert, of all text that is there to learn from."""
    recording = RecordConfig(expert=expert, out=run.folder / "recording", seed=run.seed)
    print(trimtab.record(recording, progress=display.progress).summary(), flush=True)
    fitting = FitConfig(recording=recording.out, out=run.adapter, name=run.domain, seed=run.seed)
    print(trimtab.fit(fitting, progress=display.progress).summary(), flush=True)
