"""What a run of the transfer suite measures, step by step; a step goes on where it was left."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import trimtab
from bench.transfer.cells import Answered
from bench.transfer.choices import Choice
from bench.transfer.compiler import Function, accepted, fetch_compiler, functions
from bench.transfer.domains import TEXTS
from bench.transfer.metrics import row_outcomes, row_tasks, share_right
from bench.transfer.pairs import model_ref
from bench.transfer.questions import domain_questions, general_questions, write_task
from bench.transfer.results import Found
from bench.transfer.suite import Run
from examples.demo import corpus
from trimtab import FitConfig, GenerateConfig
from trimtab.backends.hf import HFModel
from trimtab.backends.open import open_model
from trimtab.backends.pair import open_pair
from trimtab.config import CarrierName
from trimtab.evaluate import Evaluation
from trimtab.lmeval.tasks import read_task
from trimtab.progress import Display
from trimtab.store.expert import read_expert
from trimtab.store.files import read_json, sha256_bytes, write_json
from trimtab.text.documents import read_documents

LIGHT_ROWS = (
    *("host", "temperature", "bias", "bytes", "head", "memory", "head+memory"),
    *("head-shuffled", "memory-shuffled"),
)
LIVE_ROWS = ("reference", "expert", "proxy", "proxy-0.5", "mixture", "live", "all")
BOTH_ROWS = (*LIGHT_ROWS, *LIVE_ROWS)
LORA_LEARNING_RATES = (1e-4, 3e-4, 1e-3)
"""Of LoRA on the host; the best on the text that tuning held out is shown."""

LORA_NAMES = {"host": "lora-host", "memory": "lora-host+memory"}
"""What rows are called whose host is LoRA's."""

QUESTION_ROWS = ("host", "expert", "head+memory", "live", "all")
QUESTIONS = 100
"""Of each kind: a row that runs small models takes some seconds for each."""

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
    return _with_tasks(run.evaluated("light", LIGHT_ROWS, display), run)


def live(run: Run, display: Display) -> Found:
    """Rows that run the small models."""
    evaluation = run.evaluated("live", ("host", *LIVE_ROWS), display)
    return _with_tasks(evaluation, run).without("host")


def both(run: Run, display: Display) -> Found:
    """What `light` and `live` find, in one reading of the texts by the host."""
    return _with_tasks(run.evaluated("both", BOTH_ROWS, display), run)


def _with_tasks(evaluation: Evaluation, run: Run) -> Found:
    """Figures of an evaluation, and what its scores say of lines, tokens and calibration."""
    token_bytes = open_model(model_ref(run.pair.host)).vocabulary.token_bytes
    scored = evaluation.scored[""]
    outcomes = row_outcomes(scored, token_bytes)
    items = sha256_bytes(json.dumps([kept.on_host.token_ids for kept in scored]).encode())
    answered = {
        task: Answered(
            items, {row: [one[:, 0].tolist() for one in of_row] for row, of_row in by.items()}
        )
        for task, by in outcomes.items()
    }
    return Found.of(evaluation, row_tasks(scored, outcomes), answered)


def host_keys(run: Run, display: Display) -> Found:
    """The memory under keys that the host makes itself, in a pass over the memory's text."""
    rows = ("host", "memory", "head+memory", "memory-shuffled", "all")
    evaluation = run.evaluated("host-keys", rows, display, host_keys=True)
    return Found.of(evaluation, {}).renamed({row: f"{row}, host keys" for row in rows[1:]})


def questions(run: Run, display: Display) -> Found:
    """Share of questions about the domain that are answered rightly."""
    asked = domain_questions(run.domain, run.texts, QUESTIONS, seed=run.seed)
    return _answered(run, asked, QUESTION_ROWS, display)


def knowledge(run: Run, display: Display) -> Found:
    """Share of questions of two sets of general knowledge that are answered rightly."""
    return _answered(run, general_questions(QUESTIONS, TEXTS), QUESTION_ROWS, display)


def _answered(
    run: Run,
    asked: Mapping[str, Sequence[Choice]],
    rows: Sequence[str],
    display: Display,
    host: HFModel | None = None,
) -> Found:
    """Ask them by lm-evaluation-harness, as `trimtab evaluate --tasks` does."""
    if not asked:
        return Found()
    folder = run.folder / "questions"
    paths = [write_task(task, choices, folder) for task, choices in asked.items()]
    items = {task: read_task(path).sha256 for task, path in zip(asked, paths, strict=True)}
    right = run.asked(f"{'-'.join(asked)}{'-lora' if host else ''}", paths, rows, display, host)
    answered = {
        task: Answered(
            items[task], {row: [[one] for one in found] for row, found in by_row.items()}
        )
        for task, by_row in right.items()
    }
    shares = {
        task: {row: share_right(found, seed=run.seed) for row, found in by_row.items()}
        for task, by_row in right.items()
    }
    return Found(tasks=shares, answered=answered)


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
        found[row] = accepted(zig, asked, bodies)
    shares = {row: share_right(right, seed=run.seed) for row, right in found.items()}
    items = sha256_bytes(json.dumps([function.prompt for function in asked]).encode())
    answered = Answered(items, {row: [[one] for one in right] for row, right in found.items()})
    return Found(tasks={"ast-check": shares}, answered={"ast-check": answered})


def _completed(
    run: Run,
    row: str,
    carriers: tuple[CarrierName, ...],
    asked: Sequence[Function],
    display: Display,
) -> list[str]:
    """Bodies that a row writes, unless they are written; functions that end alike at once."""
    path = run.on_host / "completions" / f"{row}.json"
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
                "out": run.on_host / f"{row}.adapter",
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
    found = Found.of(evaluation, {}).changed_from(_bare(run, display), evaluation, run.seed)
    return found.renamed({"host": "prompt"})


def lora(run: Run, display: Display) -> Found:
    """LoRA on the host itself, at the learning rate that is best on held-out text."""
    best = _best_lora(run, display)
    with open_pair(best, progress=display.progress).as_expert() as tuned:
        rows = ("host", "memory")
        evaluation = run.evaluated(f"lora-host-{best.name}", rows, display, host=tuned)
    found = _with_tasks(evaluation, run).changed_from(_bare(run, display), evaluation, run.seed)
    return found.renamed(LORA_NAMES)


def _bare(run: Run, display: Display) -> Evaluation:
    """The bare host's scores, of whichever step has read the texts; `light` if none has."""
    if (run.on_host / "scores" / run.view / "both").exists():
        return run.evaluated("both", BOTH_ROWS, display)
    return run.evaluated("light", LIGHT_ROWS, display)


def lora_questions(run: Run, display: Display) -> Found:
    """What LoRA on the host answers to the questions about the domain."""
    asked = domain_questions(run.domain, run.texts, QUESTIONS, seed=run.seed)
    return _lora_answered(run, asked, display)


def lora_knowledge(run: Run, display: Display) -> Found:
    """What LoRA on the host answers to the questions of general knowledge."""
    return _lora_answered(run, general_questions(QUESTIONS, TEXTS), display)


def _lora_answered(run: Run, asked: Mapping[str, Sequence[Choice]], display: Display) -> Found:
    with open_pair(_best_lora(run, display), progress=display.progress).as_expert() as tuned:
        found = _answered(run, asked, ("host",), display, host=tuned)
    return found.renamed(LORA_NAMES)


def _best_lora(run: Run, display: Display) -> Path:
    """LoRA at each learning rate, unless it is trained; the one that is best on held-out text."""
    tuned = [run.lora(run.pair.host, display, rate) for rate in LORA_LEARNING_RATES]
    return min(tuned, key=_held_out_nats)


def _held_out_nats(expert: Path) -> float:
    held_out = read_expert(expert, verify=False).held_out
    return held_out.nats_per_token_after if held_out else float("inf")


STEPS: Mapping[str, Callable[[Run, Display], Found]] = {
    "light": light,
    "live": live,
    "both": both,
    "host-keys": host_keys,
    "questions": questions,
    "knowledge": knowledge,
    "completions": completions,
    "hostfit-head": _host_head("blend", "hostfit-head"),
    "label-head": _host_head("labels", "label-head"),
    "prompt": prompt,
    "lora-host": lora,
    "lora-questions": lora_questions,
    "lora-knowledge": lora_knowledge,
}
"""What is measured, in the order of cost."""

DEFAULT_STEPS = [name for name in STEPS if name not in {"light", "live"}]
"""All, the host's rows and those with small models beside it in one."""
