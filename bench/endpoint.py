r"""How much of an expert's gain a host keeps that shows its likeliest tokens only.

    python -m bench.endpoint --adapter FOLDER --host MODEL --small MODEL --zig FOLDER \\
        --leave-out FOLDER ... --out RESULT.json

The host runs here, and of its distribution at each place only the likeliest tokens are passed on,
as an API would pass them. Its own bits per byte are those of its full distribution. A token that is
not shown is to the blends what the small models make of it. The host itself, as a part of the
mixture, gives each token its full probability, as it does where the API draws that part ("top 20");
in "top 20, host cut off" it gives what is made of what it has shown, and all tokens are evidence.

Text: the middles of Zig files that lie in none of the folders to leave out (give the demo's
training and test files), of modules of Python's library, and passages of Moby-Dick.
"""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from bench import held_out
from trimtab.backends.hf import HFModel
from trimtab.backends.live import Live
from trimtab.backends.open import open_model
from trimtab.backends.reading import LiveReading
from trimtab.blend import evidence_weights, mixture_logprobs
from trimtab.metrics import DocumentScore, bits_per_byte, draws
from trimtab.progress import Display
from trimtab.steering.beside import open_beside
from trimtab.steering.predictors import Steering
from trimtab.steering.rows import prior_of
from trimtab.steering.scoring import score_document
from trimtab.steering.truncated import EXPECTED, Shown, fair_evidence, truncated
from trimtab.steering.unseen import Unseen
from trimtab.store.files import package_versions, write_json
from trimtab.store.manifest import read_manifest
from trimtab.types import Document

TOPS = (20, 5)
RESAMPLES = 2_000
"""Of documents, for standard errors."""

CHUNK_PLACES = 16
"""Which share their candidates."""

PLACES_AT_ONCE = 64
"""Whose full distributions the host computes together."""


@dataclass
class Sums:
    """Nats of each way over one kind of text.

    Attributes:
        nats: By way, one a document.
        sizes: Bytes of each document.
        tokens: Scored tokens.
    """

    nats: dict[str, list[float]] = field(default_factory=dict)
    sizes: list[int] = field(default_factory=list)
    tokens: int = 0

    def bits_per_byte(self) -> dict[str, float]:
        """By way, pooled over documents."""
        return {
            way: bits_per_byte([*map(DocumentScore, nats, self.sizes)])
            for way, nats in self.nats.items()
        }

    def kept(self, way: str) -> tuple[float, float]:
        """Share of the gain of full logits that a way keeps, and its standard error."""
        host, full, own = (self._resampled(name) for name in ("host", "full", way))
        shares = (host - own) / (host - full)
        host, full, own = (sum(self.nats[name]) for name in ("host", "full", way))
        return (host - own) / (host - full), float(shares.std())

    def error_against_host(self, way: str) -> float:
        """Standard error of a way's nats over the host's."""
        return float((self._resampled(way) / self._resampled("host")).std())

    def _resampled(self, way: str) -> np.ndarray:
        """Nats of each bootstrap sample of the documents, the same samples for all ways."""
        return np.array(self.nats[way])[draws(len(self.sizes), 0, RESAMPLES)].sum(1)


def main() -> None:
    parser = held_out.arguments(__doc__)
    parser.add_argument("--documents", type=int, default=8)
    parser.add_argument("--skip-documents", type=int, default=0, help="of each kind")
    parser.add_argument("--kinds", nargs="*", default=["zig", "python", "prose"])
    parser.add_argument("--document-tokens", type=int, default=200)
    parser.add_argument("--dtype", default="auto")
    given = parser.parse_args()
    display, manifest = Display(), read_manifest(given.adapter)
    host = open_model(given.host, dtype=given.dtype, progress=display.progress)
    pair = open_beside(manifest, given.adapter, small=given.small, dtype=given.dtype)
    live = Live(pair, host)
    unseen = Unseen(live)
    steering = Steering(("host", "live"), live=live, blend=manifest.blend)
    texts = {
        kind: documents[given.skip_documents :][: given.documents]
        for kind, documents in {
            "zig": held_out.zig_documents(given.zig, given.leave_out),
            "python": held_out.python_documents(),
            "prose": held_out.prose_documents(),
        }.items()
        if kind in given.kinds
    }
    found = {kind: Sums() for kind in texts}
    total = sum(map(len, texts.values()))
    with display.progress("scoring (documents)", total) as advance:
        # Kinds take turns, so that a run that was ended early has some of each.
        for documents in zip_longest(*texts.values()):
            for kind, document in zip(texts, documents, strict=True):
                if document is None:
                    continue
                score(host, steering, unseen, document, given.document_tokens, found[kind])
                # Whatever ends the run, what was scored counts.
                write_json(given.out, result(given, texts, found))
                advance(1)
    print(given.out.read_text())


def score(
    host: HFModel, steering: Steering, unseen: Unseen, document: Document, tokens: int, sums: Sums
) -> None:
    """Score the first tokens of a document in every way."""
    ids = host.encode(document.text)[:tokens]
    pieces = [host.vocabulary.token_bytes[i] or b"" for i in ids]
    text = b"".join(pieces).decode("utf-8", "ignore")
    ids = host.encode(text)
    pieces = [host.vocabulary.token_bytes[i] or b"" for i in ids]
    full = score_document(host, text, steering, window_tokens=tokens + 8, stride_tokens=tokens + 8)
    ways = {"host": full.rows["host"].logprobs, "full": full.rows["live"].logprobs}
    first = len(ids) - len(ways["host"])
    live = unseen.live
    reading = live.read(
        [b"".join(pieces[:i]) for i in range(first, len(ids))],
        host_ids=[ids[:i] for i in range(first, len(ids))],
        host_lasts=[ids[i - 1] if i else None for i in range(first, len(ids))],
    )
    logprobs = host_logprobs(host, ids, first)
    for top in TOPS:
        places = [
            place_scores(steering, unseen, reading, some, (logprobs, ids[first:], top))
            for some in chunks(len(ids) - first)
        ]
        scores = torch.cat(places, 1)
        assert steering.families["live"][0] == "host"
        was_shown = ways["host"] >= torch.stack([row.topk(top).values[-1] for row in logprobs])
        evidence = fair_evidence(scores, ways["host"], was_shown)
        drawn = torch.cat([ways["host"][None], scores[1:]])
        ways[f"top {top}"] = mixed(steering, drawn, evidence)
        ways[f"top {top}, host cut off"] = mixed(steering, scores, scores)
        ways[f"host, top {top}"] = scores[0]
    sums.sizes.append(sum(map(len, pieces[first:])))
    sums.tokens += len(ids) - first
    for way, row in ways.items():
        sums.nats.setdefault(way, []).append(-float(row.double().sum()))


def host_logprobs(host: HFModel, ids: Sequence[int], first: int) -> list[Tensor]:
    """The host's log-probabilities before each token from the first scored one, each [vocab]."""
    context = host.context_ids()
    with torch.inference_mode():
        states = host.hidden(torch.tensor([[*context, *ids]]))[0]
        states = states[len(context) + first - 1 : len(context) + len(ids) - 1]
        parts = [
            host.unembedding.logits(p).float().log_softmax(-1) for p in states.split(PLACES_AT_ONCE)
        ]
    return list(torch.cat(parts))


def chunks(count: int) -> list[range]:
    """Places that are steered at once."""
    return [range(i, min(i + CHUNK_PLACES, count)) for i in range(0, count, CHUNK_PLACES)]


def place_scores(
    steering: Steering,
    unseen: Unseen,
    reading: LiveReading,
    places: range,
    asked: tuple[Sequence[Tensor], Sequence[int], int],
) -> Tensor:
    """What each predictor gives to the tokens that came, shape [predictors, places].

    What is said of a token does not hang on its having come: it is a candidate together with all
    tokens that the same small token begins, which share what that token is worth to the small
    models, and these are asked of it as they would be of any other.

    Args:
        steering: The blends.
        unseen: What is known of tokens that are not shown.
        reading: How the small models have read the contexts.
        places: Which of them.
        asked: Of all places the host's log-probabilities and the token that came; how many tokens
            the host shows.
    """
    logprobs, came, top = asked
    rows = []
    for place in places:
        best = logprobs[place].topk(top)
        rows.append(dict(zip(best.indices.tolist(), best.values.tolist(), strict=True)))
    targets = [came[place] for place in places]
    wanted = [unseen.likely(reading, places, EXPECTED), *map(unseen.begun_alike, targets)]
    shown = Shown.of(rows, torch.cat(wanted), unseen.prior, targets)
    found = truncated(steering, unseen.live, reading, places, shown)
    stacked = torch.stack([found[name] for name in steering.families["live"]])
    columns = torch.searchsorted(shown.token_ids, torch.tensor(targets))
    return stacked[:, torch.arange(len(targets)), columns]


def mixed(steering: Steering, scores: Tensor, evidence: Tensor) -> Tensor:
    """Log-probabilities of the weighed mixture, [tokens]; arguments are [predictors, tokens]."""
    prior = prior_of(steering.families["live"], steering.blend)
    weights = evidence_weights(evidence, prior, share=steering.blend.share)[:, :-1]
    return mixture_logprobs(scores.double(), weights)


def result(
    given: argparse.Namespace, texts: Mapping[str, Sequence[Document]], found: Mapping[str, Sums]
) -> dict[str, object]:
    """What is recorded."""
    kinds = {}
    for kind, sums in found.items():
        if not sums.sizes:
            continue
        bits = sums.bits_per_byte()
        against = {way: 100 * (value / bits["host"] - 1) for way, value in bits.items()}
        kinds[kind] = {
            "documents": [document.name for document in texts[kind][: len(sums.sizes)]],
            "tokens": sums.tokens,
            "bytes": sum(sums.sizes),
            "bits_per_byte": {way: round(value, 4) for way, value in bits.items()},
            "against_host_percent": {way: round(value, 2) for way, value in against.items()},
        }
        if len(sums.sizes) > 1:
            kinds[kind]["against_host_percent_stderr"] = {
                way: round(100 * sums.error_against_host(way), 2) for way in bits
            }
        if kind == "zig" and len(sums.sizes) > 1:
            shares = {f"top {top}": sums.kept(f"top {top}") for top in TOPS}
            kinds[kind]["kept_of_full_gain_percent"] = {
                way: {"mean": round(100 * share, 1), "stderr": round(100 * error, 1)}
                for way, (share, error) in shares.items()
            }
    return {
        "question": "How much of the expert's gain does a host keep that shows k tokens only?",
        "host": Path(given.host).parent.name or given.host,
        "adapter": read_manifest(given.adapter).name,
        "expected": EXPECTED,
        "unit": "bits per byte of the host's full distribution and of each blend",
        "kinds": kinds,
        "packages": package_versions(),
    }


if __name__ == "__main__":
    main()
