"""What a run of the transfer suite measures, step by step; a step goes on where it was left."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import trimtab
from bench.transfer.choices import Choice, accuracy
from bench.transfer.compiler import Function, fetch_compiler, functions, share_accepted
from bench.transfer.domains import TEXTS
from bench.transfer.metrics import row_tasks
from bench.transfer.pairs import model_ref
from bench.transfer.questions import domain_questions, general_questions, write_texts
from bench.transfer.results import Found
from bench.transfer.suite import Run
from examples.demo import corpus
from trimtab import FitConfig, GenerateConfig
from trimtab.backends.open import open_model
from trimtab.backends.pair import open_pair
from trimtab.config import CarrierName
from trimtab.metrics import Estimate
from trimtab.progress import Display
from trimtab.steering.kept import Kept
from trimtab.store.expert import read_expert
from trimtab.store.files import read_json, write_json
from trimtab.text.documents import read_documents

LIGHT_ROWS = (
    *("host", "temperature", "bias", "bytes", "head", "memory", "head+memory"),
    *("head-shuffled", "memory-shuffled"),
)
LIVE_ROWS = ("reference", "expert", "proxy", "proxy-0.5", "mixture", "live", "all")
LORA_LEARNING_RATES = (1e-4, 3e-4, 1e-3)
"""Of LoRA on the host; the best on the text that tuning held out is shown."""

QUESTION_ROWS = (
    *("host", "reference", "expert", "proxy"),
    *("head", "memory", "head+memory", "live", "all"),
)
QUESTIONS = 100
"""Of each kind."""

COMPLETED_ROWS: Mapping[str, tuple[CarrierName, ...]] = {
    "host": (),
    "head": ("head",),
    "memory": ("memory",),
    "head+memory": ("head", "memory"),
    "live": ("expert",),
    "all": ("head", "memory", "expert"),
}
COMPLETIONS, COMPLETION_TOKENS, COMPLETION_BATCH = 64, 128, 32

PROMPT_TOKENS = 1024
"""Domain text in context, in host tokens."""


def light(run: Run, display: Display) -> Found:
    """The host, controls, and carriers that need no small model beside it."""
    evaluation = run.evaluated("light", LIGHT_ROWS, display)
    host = open_model(model_ref(run.pair.host))
    return Found.of(evaluation, row_tasks(evaluation.scored[""], host.vocabulary.token_bytes))


def live(run: Run, display: Display) -> Found:
    """Rows that run the small models."""
    evaluation = run.evaluated("live", ("host", *LIVE_ROWS), display)
    host = open_model(model_ref(run.pair.host))
    tasks = row_tasks(evaluation.scored[""], host.vocabulary.token_bytes)
    return Found.of(evaluation, tasks).without("host")


def host_keys(run: Run, display: Display) -> Found:
    """The memory under keys that the host makes itself, in a pass over the memory's text."""
    rows = ("host", "memory", "head+memory", "memory-shuffled", "all")
    evaluation = run.evaluated("host-keys", rows, display, host_keys=True)
    return Found.of(evaluation, {}).renamed({row: f"{row}, host keys" for row in rows[1:]})


def questions(run: Run, display: Display) -> Found:
    """Share of questions about the domain that are answered rightly."""
    asked = domain_questions(run.domain, run.texts, QUESTIONS, seed=run.seed)
    return _answered(run, asked, display)


def knowledge(run: Run, display: Display) -> Found:
    """Share of questions of two sets of general knowledge that are answered rightly."""
    return _answered(run, general_questions(QUESTIONS, TEXTS), display)


def _answered(run: Run, asked: Mapping[str, Sequence[Choice]], display: Display) -> Found:
    tasks: dict[str, Mapping[str, Estimate]] = {}
    for task, choices in asked.items():
        path = run.folder / "questions" / f"{task}.jsonl"
        write_texts(choices, path)
        evaluation = run.evaluated(task, QUESTION_ROWS, display, questions=path)
        tasks[task] = accuracy(choices, _nats(evaluation.scored[""]), seed=run.seed)
    return Found(tasks=tasks)


def _nats(scored: Sequence[Kept]) -> dict[str, list[float]]:
    """What each text costs, by row."""
    found: dict[str, list[float]] = {}
    for kept in scored:
        costs = {row: -float(score.logprobs.sum()) for row, score in kept.on_host.rows.items()}
        for row, cost in (
            costs | {row: alone.nll_nats for row, alone in kept.small.items()}
        ).items():
            found.setdefault(row, []).append(cost)
    return found


def completions(run: Run, display: Display) -> Found:
    """Share of completed Zig functions that the compiler's parser accepts; other text has none."""
    if run.domain != "zig":
        return Found()
    zig, std = fetch_compiler(TEXTS), corpus.fetch_zig(TEXTS)
    names = sorted(p.relative_to(run.texts / "test") for p in (run.texts / "test").rglob("*.zig"))
    asked = functions({str(name): (std / name).read_text() for name in names}, COMPLETIONS, zig)
    found = {}
    for row, carriers in COMPLETED_ROWS.items():
        bodies = _completed(run, row, carriers, asked, display)
        found[row] = share_accepted(zig, asked, bodies, seed=run.seed)
    return Found(tasks={"ast-check": found})


def _completed(
    run: Run,
    row: str,
    carriers: tuple[CarrierName, ...],
    asked: Sequence[Function],
    display: Display,
) -> list[str]:
    """Bodies that a row writes, unless they are written; functions that end alike at once."""
    path = run.folder / "completions" / f"{row}.json"
    kept = read_json(path, "completions") if path.exists() else {}
    for end in dict.fromkeys(function.end for function in asked):
        prompts = [f.prompt for f in asked if f.end == end and f.prompt not in kept]
        for first in range(0, len(prompts), COMPLETION_BATCH):
            batch = tuple(prompts[first : first + COMPLETION_BATCH])
            config = GenerateConfig(
                host=model_ref(run.pair.host),
                prompt=batch,
                adapter=run.adapter if carriers else None,
                carriers=carriers or None,
                max_new_tokens=COMPLETION_TOKENS,
                stop=(end,),
            )
            texts = trimtab.generate(config, progress=display.progress).texts
            kept |= dict(zip(batch, texts, strict=True))
            write_json(path, kept)
    return [kept[function.prompt] for function in asked]


def _host_head(targets: str, row: str) -> Callable[[Run, Display], Found]:
    def step(run: Run, display: Display) -> Found:
        fitting = FitConfig.model_validate(
            {
                "recording": run.folder / "recording",
                "out": run.folder / f"{row}.adapter",
                "carriers": ("head",),
                "host": model_ref(run.pair.host),
                "targets": targets,
                "seed": run.seed,
            }
        )
        trimtab.fit(fitting, progress=display.progress)
        evaluation = run.evaluated(row, ("host", "head"), display, adapter=fitting.out)
        return Found.of(evaluation, {}).renamed({"head": row})

    return step


def prompt(run: Run, display: Display) -> Found:
    """The host with domain text in its context: the beginning of the training text."""
    host = open_model(model_ref(run.pair.host))
    documents = read_documents([str(run.texts / "train")])
    ids = [i for document in documents for i in host.encode(document.text)][:PROMPT_TOKENS]
    read = replace(host, preamble=tuple(ids))
    evaluation = run.evaluated("prompt", ("host",), display, host=read)
    return Found.of(evaluation, {}).renamed({"host": "prompt"}).without_changes()


def lora(run: Run, display: Display) -> Found:
    """LoRA on the host itself, at the learning rate that is best on held-out text."""
    host = model_ref(run.pair.host)
    experts = {
        rate: run.tuned(host, f"lora-host/{rate:g}", display, learning_rate=rate)
        for rate in LORA_LEARNING_RATES
    }
    rate = min(experts, key=lambda rate: _held_out_nats(experts[rate]))
    with open_pair(experts[rate], progress=display.progress).as_expert() as tuned:
        rows = ("host", "memory")
        evaluation = run.evaluated(f"lora-host-{rate:g}", rows, display, host=tuned)
    names = {"host": "lora-host", "memory": "lora-host+memory"}
    return Found.of(evaluation, {}).renamed(names).without_changes()


def _held_out_nats(expert: Path) -> float:
    held_out = read_expert(expert, verify=False).held_out
    return held_out.nats_per_token_after if held_out else float("inf")


STEPS: Mapping[str, Callable[[Run, Display], Found]] = {
    "light": light,
    "live": live,
    "host-keys": host_keys,
    "questions": questions,
    "knowledge": knowledge,
    "completions": completions,
    "hostfit-head": _host_head("blend", "hostfit-head"),
    "label-head": _host_head("labels", "label-head"),
    "prompt": prompt,
    "lora-host": lora,
}
"""What is measured, in the order of cost."""
