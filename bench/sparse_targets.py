r"""What a soft target loses in as many bytes: top-k of the expert, by how its tail is told.

    python -m bench.sparse_targets --recording FOLDER --out RESULT.json [--compact FOLDER]

The recording is of the encoding `exact`, whose states give both models' logits. Each of its
domain positions is encoded as the sparse encoding packs it and decoded again. Tokens outside the
top share the tail alike, or in the proportions of the reference, whose states a recording of any
encoding holds, as `fit` has it. A recording of the same text that is `compact` is decoded and
compared too. Bytes are those of the expert's target alone.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from trimtab.backends.pair import open_pair
from trimtab.compact import STATE_COLUMNS
from trimtab.encoding import decode_topk, encode_topk, pack_topk, unpack_topk
from trimtab.fitting.recorded import with_states
from trimtab.store.files import package_versions, write_json
from trimtab.store.recording import Recording
from trimtab.store.recording_schema import BASIS_NAME
from trimtab.types import silent
from trimtab.unembedding import Unembedding

SIZES = (8, 16, 23, 32, 64)
EVERY = 32
"""One position of so many is encoded."""

ROWS = 64


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--recording", type=Path, required=True)
    parser.add_argument("--compact", type=Path)
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
    compact = _compact(given.compact, states, pair.reference_unembedding) if given.compact else None
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
            "compact": compact,
            "packages": package_versions(),
        },
    )
    print(given.out.read_text())


def _compact(folder: Path, states: tuple[Tensor, ...], head: Unembedding) -> dict[str, Any]:
    """What a compact recording of the same text, or its beginning, has kept."""
    recording = Recording.open(folder)
    columns = recording.read("train")
    some = {name: column[::EVERY] for name, column in columns.items()}
    found = with_states(recording, some, head, silent)["expert_hidden"].float()
    exact = tuple(side[: len(found)] for side in states)
    lost = [float(_kl(*both)) for both in _logprobs((exact[0], found), head)]
    between = [float(_kl(*both)) for both in _logprobs((exact[0], exact[1]), head)]
    rows = len(columns["token_ids"])
    target_bytes = 0
    for shard in recording.manifest.shards:
        if shard.split == "train":
            with safe_open(folder / shard.file, framework="pt") as stored:
                parts = [stored.get_tensor(f"expert_{name}") for name in STATE_COLUMNS]
            target_bytes += sum(part.numel() * part.element_size() for part in parts)
    return {
        "tokens": len(found),
        "bytes_per_token": round(target_bytes / rows, 1),
        "basis_bytes": recording.manifest.files[BASIS_NAME].bytes,
        "recorded_tokens": recording.manifest.tokens,
        "lost_percent": round(100 * sum(lost) / sum(between), 3),
        "expert_to_reference_nats": round(sum(between) / len(found), 5),
        "precision": recording.manifest.encoding.model_dump(),
    }


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
