r"""What an expert loses on its way to a host's tokens, and where.

    python -m bench.carrying --adapter FOLDER --host MODEL --small MODEL --texts GLOB \
        --out RESULT.json

The expert is scored on its own tokens and, carried, on the host's, without evidence or blend. Costs
are summed between bytes where both tokenizers have a boundary: there they can be compared. A host
token says how the text goes on as well (after `.` not `name`, where `.name` is a token), so that
a single span may cost what the next one gains; the sum over a text may not.
"""

import argparse
import glob
import math
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch

from trimtab.align.strings import is_whole
from trimtab.backends.hf import HFModel
from trimtab.backends.live import Live
from trimtab.backends.open import open_model
from trimtab.cli_errors import run_program
from trimtab.steering.beside import open_beside
from trimtab.steering.field import Field, logits_in_chunks
from trimtab.store.files import package_versions, write_json
from trimtab.store.manifest import read_manifest

WORST = 30
"""Spans that are written down."""


@dataclass(frozen=True)
class Piece:
    """A token of a text.

    Attributes:
        start: Its first byte.
        text: Its bytes.
        nats: What it costs.
        host_nats: What it costs the host, if it is one of the host's tokens.
    """

    start: int
    text: bytes
    nats: float
    host_nats: float = 0.0


@dataclass(frozen=True)
class Span:
    """What lies between two bytes where both tokenizers have a boundary, in the host's tokens.

    Attributes:
        text: Their bytes, tokens parted by `|`.
        size: Bytes.
        carried_nats: What it costs the expert, carried.
        own_nats: What it costs the expert on its own tokens.
        host_nats: What it costs the host.
    """

    text: str
    size: int
    carried_nats: float
    own_nats: float
    host_nats: float


def carried_pieces(host: HFModel, live: Live, ids: list[int]) -> Iterator[Piece]:
    """What the carried expert gives to the host's tokens of a text, but for the first."""
    pieces = [host.vocabulary.token_bytes[i] or b"" for i in ids]
    before = [b"".join(pieces[:place]) for place in range(1, len(ids))]
    reading, context = live.read(before, host_lasts=ids[:-1]), host.context_ids()
    hidden = host.read(torch.tensor([context + ids])).hidden[0, len(context) : -1]
    for asked, logits in logits_in_chunks(host.unembedding, hidden, None):
        true = torch.tensor(ids[asked.start + 1 : asked.stop + 1])
        field = Field.of(logits, live.expected(reading, asked))
        candidates = torch.cat([field.token_ids, true]).unique()
        probs = logits.softmax(-1)
        expert = live.score(reading, asked, probs[:, candidates], candidates).expert
        places = torch.searchsorted(candidates, true)[:, None]
        costs = -expert.gather(1, places)[:, 0].clamp_min(1e-12).log()
        own = -probs.gather(1, true[:, None])[:, 0].log()
        for question, cost, host_cost in zip(asked, costs.tolist(), own.tolist(), strict=True):
            yield Piece(len(before[question]), pieces[question + 1], cost, host_cost)


def own_pieces(live: Live, text: bytes) -> Iterator[Piece]:
    """What the expert gives to its own tokens of a text, but for the first without a context."""
    pair, reading = live.pair, live.read([text])
    tokens, states = reading.own(0)
    logprobs = pair.expert_unembedding.logits(states.expert).float().log_softmax(-1)
    start, end = len(pair.reference.context_ids()), 0
    for place, token in enumerate(tokens):
        piece = pair.vocabulary.token_bytes[token] or b""
        if place >= max(start, 1):
            yield Piece(end, piece, -float(logprobs[place - 1, token]))
        end += len(piece) if place >= start else 0


def spans(host: list[Piece], small: list[Piece]) -> Iterator[Span]:
    """What lies between common boundaries."""
    host_at = {piece.start: place for place, piece in enumerate(host)}
    small_at = {piece.start: place for place, piece in enumerate(small)}
    for start, end in pairwise(sorted(host_at.keys() & small_at.keys())):
        mine, theirs = host[host_at[start] : host_at[end]], small[small_at[start] : small_at[end]]
        yield Span(
            "|".join(piece.text.decode(errors="replace") for piece in mine),
            end - start,
            sum(piece.nats for piece in mine),
            sum(piece.nats for piece in theirs),
            sum(piece.host_nats for piece in mine),
        )


def summary(found: list[Span]) -> dict[str, object]:
    """Bits per byte, and the spans on which most is lost."""
    size = sum(span.size for span in found)
    by_text = defaultdict[str, list[Span]](list)
    for span in found:
        by_text[span.text].append(span)
    lost = {
        text: sum(span.carried_nats - span.own_nats for span in some)
        for text, some in by_text.items()
    }
    worst = sorted(lost, key=lambda text: -lost[text])[:WORST]
    return {
        "bytes": size,
        **{
            f"{who}_bits_per_byte": sum(getattr(span, f"{who}_nats") for span in found)
            / (size * math.log(2))
            for who in ("carried", "own", "host")
        },
        "lost_nats": {text: round(lost[text], 2) for text in worst},
        "times": {text: len(by_text[text]) for text in worst},
    }


def beginning(host: HFModel, text: str, tokens: int) -> tuple[list[int], bytes]:
    """The host's first tokens of a text and their bytes, which end with a whole character."""
    ids = host.encode(text)[:tokens]
    while ids and not is_whole(
        spelled := b"".join(host.vocabulary.token_bytes[i] or b"" for i in ids)
    ):
        ids = ids[:-1]
    return ids, spelled if ids else b""


def measure() -> None:
    """Score the beginnings of some texts, and write what was found."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--adapter", type=Path, required=True)
    parser.add_argument("--host", required=True)
    parser.add_argument("--small", help="the small model, where the adapter does not name it")
    parser.add_argument("--texts", required=True, help="files; ** stands for folders")
    parser.add_argument("--documents", type=int, default=8, help="so many of them, evenly")
    parser.add_argument("--document-tokens", type=int, default=400)
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    host = open_model(given.host)
    live = Live(open_beside(read_manifest(given.adapter), given.adapter, small=given.small), host)
    files = sorted(name for name in glob.glob(given.texts, recursive=True) if Path(name).is_file())
    found = list[Span]()
    for name in files[:: max(1, len(files) // given.documents)][: given.documents]:
        ids, text = beginning(host, Path(name).read_text(), given.document_tokens)
        with torch.inference_mode():
            carried = list(carried_pieces(host, live, ids))
            found += spans(carried, list(own_pieces(live, text)))
        print(name, {k: v for k, v in summary(found).items() if k.endswith("byte")}, flush=True)
    what = (__doc__ or "").split("\n")[0]
    measured = summary(found) | {"packages": package_versions()}
    write_json(given.out, {"schema": 1, "what": what, **measured})


if __name__ == "__main__":
    run_program(measure)
