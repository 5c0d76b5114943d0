"""ARC-Easy and SciQ as task files of lm-evaluation-harness, from a package.

`python -m bench.lmeval_tasks --count 200 --out build/tasks`, then
`trimtab evaluate ADAPTER HOST --tasks build/tasks/sciq.yaml --out FOLDER`.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import yaml

from bench.transfer.choices import Choice
from bench.transfer.domains import TEXTS
from bench.transfer.questions import general_questions
from trimtab.store.files import write_atomic


def main() -> None:
    """Fetch the questions, unless they are there, and write both task files."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--count", type=int, default=200, help="questions of each set")
    parser.add_argument("--out", type=Path, default=Path("build/tasks"))
    given = parser.parse_args()
    for task, choices in general_questions(given.count, TEXTS).items():
        print(write_task(task, choices, given.out))


def write_task(name: str, choices: Sequence[Choice], folder: Path) -> Path:
    """Write a task file and its questions; the file's path."""
    lines = (
        json.dumps({"before": c.before, "choices": [o.strip() for o in c.options], "gold": c.right})
        for c in choices
    )
    write_atomic(folder / f"{name}.jsonl", "".join(f"{line}\n" for line in lines).encode())
    config = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": f"{name}.jsonl"}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{before}}",
        "doc_to_choice": "choices",
        "doc_to_target": "gold",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    }
    write_atomic(folder / f"{name}.yaml", yaml.safe_dump(config, sort_keys=False).encode())
    return folder / f"{name}.yaml"


if __name__ == "__main__":
    main()
