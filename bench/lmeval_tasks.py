"""ARC-Easy and SciQ as task files of lm-evaluation-harness, from a package.

`python -m bench.lmeval_tasks --count 200 --out build/tasks`, then
`trimtab evaluate ADAPTER HOST --tasks build/tasks/sciq.yaml --out FOLDER`.
"""

import argparse
from pathlib import Path

from bench.transfer.domains import TEXTS
from bench.transfer.questions import general_questions, write_task


def main() -> None:
    """Fetch the questions, unless they are there, and write both task files."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--count", type=int, default=200, help="questions of each set")
    parser.add_argument("--out", type=Path, default=Path("build/tasks"))
    given = parser.parse_args()
    for task, choices in general_questions(given.count, TEXTS).items():
        print(write_task(task, choices, given.out))


if __name__ == "__main__":
    main()
