"""Real multiple-choice questions through lm-evaluation-harness: bare, steered, and its own model.

`python -m bench.lmeval_run --adapter DIR --host MODEL --count 50 --out bench/results/NAME.json`
"""

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lm_eval import evaluator
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from bench.cost.cpu_flops import processor
from bench.transfer.domains import TEXTS
from bench.transfer.questions import LICENCES, general_questions, write_task
from trimtab.backends.hf import HFModel
from trimtab.backends.open import open_model
from trimtab.config import EvaluateConfig
from trimtab.evaluate import evaluate
from trimtab.lmeval.tasks import read_task
from trimtab.progress import Display
from trimtab.store.files import package_versions, write_json
from trimtab.store.manifest import read_manifest


def main() -> None:
    """Ask all three, and write figures and whether the bare answers are lm-eval's own."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--adapter", type=Path, required=True)
    parser.add_argument("--host", required=True)
    parser.add_argument("--count", type=int, default=50, help="questions of each set")
    parser.add_argument("--work", type=Path, default=Path("build/lmeval"))
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    display = Display()
    asked = general_questions(given.count, TEXTS)
    paths = [write_task(name, choices, given.work / "tasks") for name, choices in asked.items()]
    host = open_model(given.host, dtype="float32", progress=display.progress)
    config = EvaluateConfig(
        adapter=given.adapter,
        host=given.host,
        out=given.work / "report",
        tasks=tuple(paths),
        dtype="float32",
    )
    found = evaluate(config, host=host, is_named=True, progress=display.progress)
    assert found.tasks is not None
    kept = json.loads((config.out / "tasks" / "host.json").read_text())["tasks"]
    own = _harness(host, paths)
    value = {
        "host": Path(given.host).parent.name,
        "adapter": read_manifest(given.adapter).name,
        "licences": LICENCES,
        "figures": [asdict(figure) for figure in found.tasks.figures],
        "lm_eval": {name: figures for name, (figures, _) in own.items()},
        "same_answers_as_lm_eval": {
            name: sum(
                ours["filtered_resps"] == theirs
                for ours, theirs in zip(kept[name]["samples"], answers, strict=True)
            )
            for name, (_, answers) in own.items()
        },
        "questions": {name: len(choices) for name, choices in asked.items()},
        "packages": package_versions(),
        "processor": processor(),
    }
    write_json(given.out, value)
    print(found.tasks.table())
    print({name: value[name] for name in ("lm_eval", "same_answers_as_lm_eval")})


def _harness(host: HFModel, paths: list[Path]) -> dict[str, tuple[dict[str, float], list[Any]]]:
    """What lm-eval's own model of transformers hosts gives, with every answer, by task.

    All tasks at once, as `evaluate` asks them: in other batches sums are rounded otherwise.
    """
    found = evaluator.simple_evaluate(
        model=HFLM(pretrained=host.model, tokenizer=host.tokenizer, batch_size=8),
        tasks=[dict(read_task(path).config) for path in paths],
        task_manager=TaskManager(include_defaults=False),
        bootstrap_iters=1_000,
    )
    assert found
    return {path.stem: _answered(found, path.stem) for path in paths}


def _answered(found: Any, task: str) -> tuple[dict[str, float], list[Any]]:
    figures = {
        name: value
        for name, value in found["results"][task].items()
        if isinstance(value, int | float)
    }
    samples = found["samples"][task]
    return figures, [[list(one) for one in sample["filtered_resps"]] for sample in samples]


if __name__ == "__main__":
    main()
