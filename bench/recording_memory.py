r"""How much memory recording takes, by the length of the text.

    python -m bench.recording_memory --folder FOLDER --out RESULT.json [--tokens 10000 100000 ...]
        [--encodings exact sparse ...] [--processes 1]

A toy expert is tuned once, and records texts of growing length, each in a process of its own, of
whose resident memory the peak is read from the system; where several processes share the work, the
largest one's, and beside it what they hold together, a page that some of them share counted once.
The models are small, so that what grows with the text would show.
"""

import argparse
import os
import random
import re
import sys
import time
from contextlib import suppress
from pathlib import Path

from trimtab import TuneConfig
from trimtab.store.files import package_versions, write_json
from trimtab.tune import tune

MODEL = "tiny:llama?hidden=64&layers=2&vocab=bpe"
WORDS = "the rudder turns a hull and trim tabs move what large hands cannot in any sea".split()
DOCUMENT_WORDS = 2_000
LOOK_EVERY_SEC = 0.1


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--encodings", nargs="+", default=["exact", "sparse", "compact", "sampled"])
    parser.add_argument("--processes", type=int, default=1, help="of each recording [1]")
    parser.add_argument("--folder", type=Path, required=True, help="new; may be deleted")
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    texts = _texts(given.folder / "texts", max(given.tokens))
    expert = given.folder / "expert"
    few = (str(texts / "0000.txt"), str(texts / "0001.txt"))
    tune(TuneConfig(model=MODEL, data=few, out=expert, max_tokens=2_000, dtype="float32"))
    found = []
    for encoding in given.encodings:
        for tokens in given.tokens:
            out = given.folder / f"{encoding}-{tokens}"
            words = ["record", str(expert), "--out", str(out), "--data", str(texts)]
            words += ["--encoding", encoding, "--max-tokens", str(tokens)]
            words += ["--processes", str(given.processes)]
            found.append({"encoding": encoding, "tokens": tokens} | _measured(words))
            print(found[-1], flush=True)
    write_json(
        given.out,
        {
            "schema": 1,
            "what": "peak resident memory of `trimtab record` by the length of the text",
            "model": MODEL,
            "processes": given.processes,
            "runs": found,
            "packages": package_versions(),
        },
    )


def _texts(folder: Path, tokens: int) -> Path:
    """Files of drawn words, at least as many words as tokens."""
    folder.mkdir(parents=True)
    draw = random.Random(0)
    for number in range(2 + tokens // DOCUMENT_WORDS):
        words = draw.choices(WORDS, k=DOCUMENT_WORDS)
        (folder / f"{number:04}.txt").write_text(" ".join(words))
    return folder


def _measured(words: list[str]) -> dict[str, float]:
    began_sec, together_mb = time.monotonic(), 0.0
    first = os.spawnv(os.P_NOWAIT, sys.executable, [sys.executable, "-m", "trimtab", *words])
    while not (ended := os.wait4(first, os.WNOHANG))[0]:
        together_mb = max(together_mb, sum(map(_held_mb, _family(first))))
        time.sleep(LOOK_EVERY_SEC)
    _, status, usage = ended
    if status:
        raise SystemExit(f"trimtab {' '.join(words)} ended with {status}")
    return {
        # Linux counts it in KiB.
        "peak_mb": round(usage.ru_maxrss * 1024 / 1e6, 1),
        "together_mb": round(together_mb, 1),
        "wall_sec": round(time.monotonic() - began_sec, 1),
    }


def _family(first: int) -> list[int]:
    """A process and all that it has begun, as far as they live."""
    with suppress(FileNotFoundError, ProcessLookupError):
        begun = Path(f"/proc/{first}/task/{first}/children").read_text().split()
        return [first, *(one for child in begun for one in _family(int(child)))]
    return []


def _held_mb(process: int) -> float:
    """Resident memory of a process, each page divided by how many processes hold it."""
    with suppress(FileNotFoundError, ProcessLookupError):
        told = Path(f"/proc/{process}/smaps_rollup").read_text()
        # One that has just ended holds nothing.
        return sum(int(kib) * 1024 / 1e6 for kib in re.findall(r"^Pss: +(\d+)", told, re.M))
    return 0.0


if __name__ == "__main__":
    main()
