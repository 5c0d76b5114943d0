r"""How far what is carried between vocabularies can be from what all host tokens would give.

    python -m bench.ignored --adapter FOLDER --host MODEL --small MODEL --zig FOLDER \
        --leave-out FOLDER ... --out RESULT.json

Only some of a host's tokens are candidates. What the expert says after the text as its tokenizer
cuts it is carried over them, and over all of the host's tokens: how far apart the two are (total
variation, in probability), and the bound of `trimtab.align.ignored` on that.
"""

from collections.abc import Iterator, Sequence
from statistics import fmean, median

import torch
from torch import Tensor

from bench import held_out
from trimtab.align.ignored import most_ignored
from trimtab.backends.hf import HFModel
from trimtab.backends.live import Live
from trimtab.backends.open import open_model
from trimtab.cli_errors import run_program
from trimtab.steering.beside import open_beside
from trimtab.steering.field import Field, logits_in_chunks
from trimtab.store.files import package_versions, write_json
from trimtab.store.manifest import read_manifest

TAIL, ROUNDING = 0.99, 1e-5


def apart(host: HFModel, live: Live, text: str, tokens: int) -> Iterator[Tensor]:
    """Distance and bound at each place of the beginning of a text, shape [places, 2].

    Args:
        host: The host.
        live: The small models.
        text: The text.
        tokens: Host tokens that are read at most.
    """
    ids = host.encode(text)[:tokens]
    pieces = [host.vocabulary.token_bytes[i] or b"" for i in ids]
    every = torch.arange(len(host.vocabulary))
    before = [b"".join(pieces[:place]) for place in range(1, len(ids))]
    reading = live.read(before, host_lasts=ids[:-1])
    context = host.context_ids()
    with torch.inference_mode():
        hidden = host.read(torch.tensor([context + ids])).hidden[0, len(context) : -1]
        for asked, logits in logits_in_chunks(host.unembedding, hidden, None):
            field = Field.of(logits, live.expected(reading, asked))
            whole = [q for q in asked if reading.covers[q] and not reading.covers[q][0].rest]
            nodes = [reading.ends[question][0] for question in whole]
            rows = torch.tensor([question - asked.start for question in whole], dtype=torch.long)
            if nodes:
                probs = live.logits(reading, "expert", nodes).softmax(-1)
                host_probs = logits[rows].softmax(-1)
                carried = live.alignment.to_host(probs, host_probs, every)
                some = field.token_ids
                carried[:, some] -= live.alignment.to_host(probs, host_probs[:, some], some)
                distance = carried.abs().sum(-1) / 2
                bound = most_ignored(live.alignment, probs, host_probs, some)
                yield torch.stack([distance, bound], 1)


def summary(figures: Sequence[float]) -> dict[str, float]:
    """Mean, median, a high quantile and the largest of some figures."""
    return {
        "mean": fmean(figures),
        "median": median(figures),
        f"quantile_{TAIL}": sorted(figures)[int(TAIL * len(figures))],
        "largest": max(figures),
    }


def measure() -> None:
    """Take the bound over the beginnings of some texts, and write what was found."""
    parser = held_out.arguments(__doc__)
    parser.add_argument("--documents", type=int, default=4, help="of each kind")
    parser.add_argument("--document-tokens", type=int, default=160)
    given = parser.parse_args()
    host = open_model(given.host)
    pair = open_beside(read_manifest(given.adapter), given.adapter, small=given.small)
    live = Live(pair, host)
    kinds = {
        "zig": held_out.zig_documents(given.zig, given.leave_out),
        "python": held_out.python_documents(),
        "prose": held_out.prose_documents(),
    }
    found = {}
    for kind, documents in kinds.items():
        chunks = [
            chunk
            for document in documents[: given.documents]
            for chunk in apart(host, live, document.text, given.document_tokens)
        ]
        distance, bound = torch.cat(chunks).T.tolist()
        found[kind] = {
            "places": len(bound),
            "distance": summary(distance),
            "bound": summary(bound),
            "within": sum(d <= b + ROUNDING for d, b in zip(distance, bound, strict=True)),
        }
        print(kind, found[kind], flush=True)
    what = (__doc__ or "").split("\n")[0]
    write_json(
        given.out, {"schema": 1, "what": what, "kinds": found, "packages": package_versions()}
    )


if __name__ == "__main__":
    run_program(measure)
