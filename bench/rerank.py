r"""What choosing among a host's candidates gains, where the host gives text alone.

    python -m bench.rerank --adapter FOLDER --host MODEL --small MODEL --zig FOLDER \\
        --leave-out FOLDER ... --candidates FILE --out RESULT.json

The task: the rest of a line of a Zig file that lies in none of the folders to leave out. The host
runs here, and of it nothing but sampled text is used (its own likelihood of its candidates, which a
host of text alone does not tell, is a control). Expert and reference choose by the function that
`trimtab generate` uses. FILE keeps the candidates and what the small models make of them.
"""

import argparse
import difflib
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from transformers import DynamicCache

from bench import held_out
from trimtab.backends.hf import HFModel
from trimtab.backends.open import open_model
from trimtab.backends.pair import Pair
from trimtab.hosted.generating import CANDIDATE_TEMPERATURE
from trimtab.hosted.reranking import Judged, chosen, judged
from trimtab.metrics import draws
from trimtab.progress import Display
from trimtab.steering.beside import open_beside
from trimtab.store.files import package_versions, read_json, write_json
from trimtab.store.manifest import read_manifest
from trimtab.types import Document

CANDIDATES = 8
PROMPT_CHARS = 500
MAX_TOKENS = 32
LINES_A_FILE = 3
LINE_CHARS = range(24, 110)


@dataclass(frozen=True)
class Line:
    """A line to complete.

    Attributes:
        file: Where it stands.
        prompt: The text before its rest.
        rest: What is asked for.
    """

    file: str
    prompt: str
    rest: str


@dataclass(frozen=True)
class Judgement:
    """What the small models make of a continuation.

    Attributes:
        expert_nats: Natural-log probability that the expert gives to all of it.
        reference_nats: That the reference gives.
        size: Its bytes; 0 where it is empty.
    """

    expert_nats: float
    reference_nats: float
    size: int


@dataclass(frozen=True)
class Candidate:
    """What a host has written.

    Attributes:
        text: Up to the line's end.
        host_nats: The host's own log-probability of it, its end included.
        judged: What expert and reference make of it.
    """

    text: str
    host_nats: float
    judged: Judgement


def lines_of(document: Document, count: int, seed: int = 0) -> list[Line]:
    """Lines of a file's last two thirds, each cut after a word within its first half."""
    text, found = document.text, []
    starts = [i + 1 for i, char in enumerate(text) if char == "\n" and i > len(text) / 3]
    random.Random(f"{seed} {document.name}").shuffle(starts)
    for start in starts:
        line = text[start:].partition("\n")[0]
        indent = len(line) - len(line.lstrip())
        cut = line.rfind(" ", indent + 1, indent + 1 + (len(line) - indent) // 2)
        if len(line) not in LINE_CHARS or cut <= indent or line.lstrip().startswith("//"):
            continue
        prompt = text[: start + cut][-PROMPT_CHARS:].partition("\n")[2]
        found.append(Line(document.name, prompt, line[cut:]))
        if len(found) == count:
            break
    return found


@torch.inference_mode()
def sampled(host: HFModel, prompt: str, seed: int) -> list[tuple[str, float]]:
    """Candidates up to the line's end, and the host's own log-probability of each."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.tensor([[*host.context_ids(), *host.encode(prompt)]])
    cache = DynamicCache(config=host.model.config)
    logits = host.model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1]
    cache.batch_repeat_interleave(CANDIDATES)
    logits, going = logits.expand(CANDIDATES, -1), list(range(CANDIDATES))
    texts, nats = [b""] * CANDIDATES, [0.0] * CANDIDATES
    for _ in range(MAX_TOKENS):
        probs = (logits.float() / CANDIDATE_TEMPERATURE).softmax(-1)
        drawn = torch.multinomial(probs, 1, generator=generator)
        own = logits.float().log_softmax(-1).gather(1, drawn)[:, 0]
        pieces = [host.vocabulary.token_bytes[token] for token in drawn[:, 0].tolist()]
        for row, piece, nat in zip(going, pieces, own.tolist(), strict=True):
            nats[row] += nat
            texts[row] += piece or b""
        left = [place for place, piece in enumerate(pieces) if piece and b"\n" not in piece]
        if not left:
            break
        going = [going[place] for place in left]
        cache.batch_select_indices(torch.tensor(left))
        logits = host.model(drawn[left], past_key_values=cache, use_cache=True).logits[:, -1]
    ended = [text.partition(b"\n")[0].decode("utf-8", "ignore") for text in texts]
    return list(zip(ended, nats, strict=True))


def similarity(text: str, rest: str) -> float:
    """Edit similarity: twice the matching characters over all, spaces at the ends left out."""
    return difflib.SequenceMatcher(None, text.strip(), rest.strip(), autojunk=False).ratio()


def is_exact(text: str, rest: str) -> float:
    return float(text.strip() == rest.strip())


Measure = Callable[[str, str], float]
MEASURES: Mapping[str, Measure] = {"edit_similarity": similarity, "exact_match": is_exact}


def main() -> None:
    parser = held_out.arguments(__doc__)
    parser.add_argument("--files", type=int, default=50)
    parser.add_argument("--skip-files", type=int, default=0)
    parser.add_argument("--candidates", type=Path, required=True)
    given = parser.parse_args()
    display, manifest = Display(), read_manifest(given.adapter)
    free = held_out.free_zig(given.zig, given.leave_out)[given.skip_files :][: given.files]
    lines = [line for document in free for line in lines_of(document, LINES_A_FILE)]
    kept = read_json(given.candidates, "candidates") if given.candidates.is_file() else {}
    if len(kept) < len(lines):
        host = open_model(given.host, progress=display.progress)
        pair = open_beside(manifest, given.adapter, small=given.small)
        with display.progress("sampling and judging (lines)", len(lines)) as advance:
            for number, line in enumerate(lines):
                if str(number) not in kept:
                    kept[str(number)] = [asdict(c) for c in candidates(host, pair, line, number)]
                    # Whatever ends the run, what was sampled is there.
                    write_json(given.candidates, kept)
                advance(1)
    found = [[_candidate(one) for one in kept[str(i)]] for i in range(len(lines))]
    write_json(given.out, result(given, lines, found))
    print(given.out.read_text())


def candidates(host: HFModel, pair: Pair, line: Line, seed: int) -> list[Candidate]:
    """What the host writes, and what the small models make of it."""
    written = sampled(host, line.prompt, seed)
    texts = [text for text, _ in written]
    reference = judged(pair.reference, line.prompt, texts, None)
    with pair.as_expert() as model:
        expert = judged(model, line.prompt, texts, None)
    by = [Judgement(e.nats, r.nats, e.size) for e, r in zip(expert, reference, strict=True)]
    return [Candidate(text, nats, one) for (text, nats), one in zip(written, by, strict=True)]


def _candidate(kept: Mapping[str, object]) -> Candidate:
    by = kept["judged"]
    assert isinstance(by, dict)
    return Candidate(str(kept["text"]), float(str(kept["host_nats"])), Judgement(**by))


Choice = Callable[[Sequence[Candidate]], int]


def largest(score: Callable[[Candidate], float]) -> Choice:
    """The first of those with the largest score; an empty candidate is the last resort."""

    def choice(found: Sequence[Candidate]) -> int:
        scores = [score(one) if one.judged.size else float("-inf") for one in found]
        return scores.index(max(scores))

    return choice


def most_common(found: Sequence[Candidate]) -> int:
    """The candidate that was written most often; of those the first."""
    texts = [one.text.strip() for one in found]
    return max(range(len(texts)), key=lambda i: (texts.count(texts[i]), -i))


CHOICES: Mapping[str, Choice] = {
    "shipped": lambda found: chosen([Judged(c.judged.expert_nats, c.judged.size) for c in found]),
    "first": lambda _: 0,
    "most common": most_common,
    "host's likelihood": largest(lambda c: c.host_nats),
    "host's likelihood / byte": largest(lambda c: c.host_nats / c.judged.size),
    "reference / byte": largest(lambda c: c.judged.reference_nats / c.judged.size),
    "expert": largest(lambda c: c.judged.expert_nats),
    "expert / byte": largest(lambda c: c.judged.expert_nats / c.judged.size),
    "expert - reference": largest(lambda c: c.judged.expert_nats - c.judged.reference_nats),
    "(expert - reference) / byte": largest(
        lambda c: (c.judged.expert_nats - c.judged.reference_nats) / c.judged.size
    ),
}


def gained(
    files: Sequence[str], ways: Mapping[str, Sequence[float]], base: str
) -> dict[str, dict[str, float]]:
    """Mean of each way and its difference from one of them, with errors over whole files.

    Args:
        files: Of each line.
        ways: Of each line, by way.
        base: What the others are compared with.
    """
    names = sorted(set(files))
    place = [names.index(file) for file in files]
    count = np.bincount(place)
    drawn = draws(len(names), seed=0)
    totals = {way: np.bincount(place, weights=scores) for way, scores in ways.items()}
    means = {way: t[drawn].sum(1) / count[drawn].sum(1) for way, t in totals.items()}
    return {
        way: {
            "mean": round(float(np.mean(scores)), 4),
            "stderr": round(float(means[way].std()), 4),
            "gain": round(float(np.mean(scores) - np.mean(ways[base])), 4),
            "gain_stderr": round(float((means[way] - means[base]).std()), 4),
        }
        for way, scores in ways.items()
    }


def result(
    given: argparse.Namespace, lines: Sequence[Line], found: Sequence[Sequence[Candidate]]
) -> dict[str, object]:
    """What is recorded."""
    files, measures, over_reference = [line.file for line in lines], {}, {}
    for name, measure in MEASURES.items():
        scores = [
            [measure(one.text, line.rest) for one in some]
            for line, some in zip(lines, found, strict=True)
        ]
        pairs = [*zip(scores, found, strict=True)]
        ways = {"random": [sum(row) / len(row) for row in scores]}
        ways |= {way: [row[of(some)] for row, some in pairs] for way, of in CHOICES.items()}
        ways["best of all"] = [max(row) for row in scores]
        measures[name] = gained(files, ways, "random")
        by_tuning = {way: ways[way] for way in ("reference / byte", "expert / byte")}
        over_reference[name] = gained(files, by_tuning, "reference / byte")["expert / byte"]
    return {
        "question": "What does choosing among a host's candidates gain, by the small models alone?",
        "task": "the rest of a line of Zig",
        "host": Path(given.host).parent.name or given.host,
        "adapter": read_manifest(given.adapter).name,
        "candidates": CANDIDATES,
        "temperature": CANDIDATE_TEMPERATURE,
        "lines": len(lines),
        "files": sorted(set(files)),
        "distinct_candidates": round(
            sum(len({one.text.strip() for one in some}) for some in found) / len(found), 2
        ),
        "gain": "against the mean over all candidates; standard errors over whole files",
        "measures": measures,
        "expert_over_reference": over_reference,
        "packages": package_versions(),
    }


if __name__ == "__main__":
    main()
