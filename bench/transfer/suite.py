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
        folder: Folder of what needs no host (texts, expert, recording, adapter), which runs of one
            small model share: one adapter steers all their hosts.
        test_tokens: Score at most this many host tokens of test text.
        view: Which part of the test texts is scored: `test`, or `beginnings` where the domain's
            test documents are the middles of their texts.
        scores_general: Whether general text is scored too.
        train_bytes: How much text is there to learn from (default: the domain's budget).
    """

    pair: Pair
    domain: str
    seed: int
    folder: Path
    test_tokens: int
    view: str = "test"
    scores_general: bool = True
    train_bytes: int | None = None

    @property
    def texts(self) -> Path:
        """Where the run's texts lie."""
        return self.folder / "texts"

    @property
    def adapter(self) -> Path:
        """The adapter."""
        return self.folder / "domain.adapter"

    @property
    def on_host(self) -> Path:
        """Where everything lies that is made with the host or measured on it."""
        return self.folder / "hosts" / self.pair.name

    def tuned(self, model: str, out: Path, display: Display, **settings: float) -> Path:
        """Tune a model on the training text, unless it is done; the expert's folder."""
        config = TuneConfig(
            model=model,
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


def name_of(seed: int, train_bytes: int | None) -> str:
    """The name of a run's folder."""
    return f"seed{seed}" + (f"-{train_bytes}-bytes" if train_bytes else "")


def folder_of(base: Path, small: str, domain: str, name: str) -> Path:
    """The folder of runs of one small model on one domain."""
    return base / folder_name(small) / domain / name


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
    expert = run.tuned(model_ref(run.pair.small), run.folder / "expert", display)
    adapter_of(run, expert, display)


def adapter_of(run: Run, expert: Path, display: Display) -> None:
    """Recording and adapter of an expert, of all text that is there to learn from."""
    recording = RecordConfig(expert=expert, out=run.folder / "recording", seed=run.seed)
    print(trimtab.record(recording, progress=display.progress).summary(), flush=True)
    fitting = FitConfig(recording=recording.out, out=run.adapter, name=run.domain, seed=run.seed)
    print(trimtab.fit(fitting, progress=display.progress).summary(), flush=True)
