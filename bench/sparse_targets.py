r"""What a soft target loses in as many bytes: top-k of the expert, by how its tail is told.

    python -m bench.sparse_targets --recording FOLDER --out RESULT.json

The recording is of the encoding `exact`, whose states give both models' logits. Each of its
domain positions is encoded as the sparse encoding packs it and decoded again. Tokens outside the
top share the tail alike, or in the proportions of the reference, whose states a recording of any
encoding holds, as `fit` has it. Bytes are those of the expert's target alone.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from trimtab.backends.pair import open_pair
from trimtab.encoding import decode_topk, encode_topk, pack_topk, unpack_topk
from trimtab.store.files import package_versions, write_json
from trimtab.store.recording import Recording
from trimtab.unembedding import Unembedding

SIZES = (8, 16, 23, 32, 64)
EVERY = 32
"""One position of so many is encoded."""

ROWS = 64


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--recording", type=Path, required=True)
    parser.add_argument("--expert", type=Path, help="default: as the recording says")
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    recording = Recording.open(given.recording)
    pair = open_pair(given.expert or given.recording.parent / "expert", dtype="float32")
    rows = recording.read("train")
    # Some positions: neighbours say much the same.
    states = tuple(rows[f"{who}_hidden"][::EVERY].float() for who in ("expert", "reference"))
    sums = {size: [0.0, 0.0, 0.0] for size in SIZES}
    between = 0.0
    for expert, reference in _logprobs(states, pair.reference_unembedding):
        between += float(_kl(expert, reference))
        for size, found in sums.items():
            packed = pack_topk(encode_topk(expert, size), expert.shape[1])
            topk = unpack_topk(packed, expert.shape[1])
            found[0] += sum(part.numel() * part.element_size() for part in packed.values())
            found[1] += float(_kl(expert, decode_topk(topk, expert.shape[1])))
            found[2] += float(_kl(expert, decode_topk(topk, expert.shape[1], reference)))
    count = len(states[0])
    write_json(
        given.out,
        {
            "schema": 1,
            "what": "the expert's soft target in as many bytes a token: KL(expert, stored) as a"
            " share of KL(expert, reference), in percent",
            "tokens": count,
            "expert_to_reference_nats": round(between / count, 5),
            "sizes": {
                str(size): {
                    "bytes_per_token": round(size_bytes / count, 1),
                    "tail_alike_percent": round(100 * alike / between, 3),
                    "tail_as_the_reference_percent": round(100 * told / between, 3),
                }
                for size, (size_bytes, alike, told) in sums.items()
            },
            "packages": package_versions(),
        },
    )
    print(given.out.read_text())


def _logprobs(states: tuple[Tensor, ...], head: Unembedding) -> Iterator[tuple[Tensor, Tensor]]:
    """Both models' log-probabilities over some positions at a time, [rows, vocab] each."""
    with torch.no_grad():
        for some in zip(*(side.split(ROWS) for side in states), strict=True):
            expert, reference = (head.logits(part).float().log_softmax(-1) for part in some)
            yield expert, reference


def _kl(expert: Tensor, other: Tensor) -> Tensor:
    """Sum of KL(expert, other) over positions, in nats."""
    return (expert.double().exp() * (expert.double() - other.double())).sum()


if __name__ == "__main__":
    main()
