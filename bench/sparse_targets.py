r"""What a soft target loses in as many bytes: top-k of the expert, by how its tail is told.

    python -m bench.sparse_targets --recording FOLDER --out RESULT.json

The recording is of the encoding `exact`, whose states give both models' logits. Each of its
domain positions is encoded as the sparse encoding packs it and decoded again. Tokens outside the
top share the tail alike, or in the proportions of the reference, whose states a recording of any
encoding holds, as `fit` has it. The compact encoding's code is made of other positions. Bytes are
those of the expert's target alone.
"""

import argparse
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trimtab.backends.pair import open_pair
from trimtab.compact import SAMPLE_ROWS, code_for
from trimtab.encoding import bits_needed, decode_topk, encode_topk, pack_topk, unpack_topk
from trimtab.losses import kl_nats
from trimtab.store.files import package_versions, write_json
from trimtab.store.recording import Recording
from trimtab.stored_states import pack_states
from trimtab.unembedding import Unembedding

SIZES = (8, 16, 23, 32, 64)
EVERY = 32
"""One position of so many is encoded."""

ROWS = 64

Rows = tuple[Tensor, ...]
"""Some states of expert and reference."""


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
    sides = [rows[f"{who}_hidden"] for who in ("expert", "reference")]
    states = tuple(side[EVERY // 2 :: EVERY].float() for side in sides)
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
    others = torch.arange(len(sides[0]))
    others = others[others % EVERY != EVERY // 2]
    others = others[:: max(1, len(others) // SAMPLE_ROWS)]
    sample = tuple(side[others].float() for side in sides)
    vocab = recording.manifest.vocab
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
            "compact": _compact(sample, states, pair.reference_unembedding, vocab),
            "packages": package_versions(),
        },
    )
    print(given.out.read_text())


def _compact(sample: Rows, states: Rows, head: Unembedding, vocab: int) -> dict[str, Any]:
    """What the compact encoding keeps of some states, with a code that others have decided."""
    code = code_for(sample[1], sample[0], head)
    expert, reference = states
    began = time.perf_counter()
    stored = code.encode(reference, expert)
    packed = pack_states(stored, bits_needed(vocab))
    encoded = time.perf_counter()
    found = code.decode(reference, stored)
    decoded = time.perf_counter()
    lost = sum(float(_kl(*both)) for both in _logprobs((expert, found), head))
    between = sum(float(_kl(*both)) for both in _logprobs(states, head))
    size = sum(part.numel() * part.element_size() for part in packed.values())
    return {
        "bytes_per_token": round(size / len(expert), 1),
        "lost_percent": round(100 * lost / between, 3),
        "precision": asdict(code.precision),
        "hidden": expert.shape[1],
        "encoding_ms_per_token": round(1e3 * (encoded - began) / len(expert), 1),
        "decoding_ms_per_token": round(1e3 * (decoded - encoded) / len(expert), 1),
        "threads": torch.get_num_threads(),
    }


def _logprobs(states: tuple[Tensor, ...], head: Unembedding) -> Iterator[tuple[Tensor, Tensor]]:
    """Both models' log-probabilities over some positions at a time, [rows, vocab] each."""
    with torch.no_grad():
        for some in zip(*(side.split(ROWS) for side in states), strict=True):
            expert, reference = (head.logits(part).float().log_softmax(-1) for part in some)
            yield expert, reference


def _kl(expert: Tensor, other: Tensor) -> Tensor:
    """Sum of KL(expert, other) over positions, in nats."""
    return kl_nats(expert.double(), other.double()).sum()


if __name__ == "__main__":
    main()
