"""Write the task: `python -m bench.classify --out build/classify`, then read it with compare.

`trimtab compare --task build/classify/task.jsonl --small MODEL --host MODEL --out FOLDER`.
"""

import argparse
import json
from pathlib import Path

from bench.classify.docstrings import DOWNLOAD_MB, LICENCE, SOURCES, descriptions, questions
from trimtab.store.files import sha256_bytes, write_atomic


def main() -> None:
    """Fetch the four packages' texts and write `task.jsonl`."""
    parser = argparse.ArgumentParser(prog="bench.classify", description="Write the task.")
    parser.add_argument("--each", type=int, default=60, help="questions of each field")
    parser.add_argument("--seed", type=int, default=0, help="seed of the draw")
    parser.add_argument("--out", type=Path, default=Path("build/classify"))
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    print(f"{DOWNLOAD_MB} MB will be downloaded, none of it run: {LICENCE}", flush=True)
    found = {source.label: descriptions(source, given.out) for source in SOURCES}
    lines = questions(found, given.each, seed=given.seed)
    data = "".join(f"{json.dumps(line, ensure_ascii=False)}\n" for line in lines).encode()
    write_atomic(given.out / "task.jsonl", data)
    counts = ", ".join(f"{label} {len(texts)}" for label, texts in found.items())
    print(f"{given.out / 'task.jsonl'}: {len(lines)} of {counts}; sha256 {sha256_bytes(data)}")


if __name__ == "__main__":
    main()
