"""A host's hidden states on documents, and where another model has read the same bytes."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from trimtab.align.strings import token_lengths
from trimtab.backends.hf import HFModel
from trimtab.store.files import writing_atomically
from trimtab.store.local import trimtab_home
from trimtab.text.passages import passages
from trimtab.types import Progress

WINDOW_TOKENS = 512
"""Host tokens that are run at once; fewer where the host's positions end before."""

CONTEXT_TOKENS = 64
"""Tokens of context that each window but the first repeats."""


_VERSION = 2
"""Changes whenever states are computed in another way."""


@dataclass(frozen=True)
class HostStates:
    """A host's states on documents, at every one of its tokens.

    Attributes:
        token_ids: The host's tokens, shape [positions].
        hidden: In the host's dtype, shape [positions, hidden of host].
        document_index: Document of each, shape [positions].
        byte_ends: Bytes of its document read, the token's own included, shape [positions].
    """

    token_ids: Tensor
    hidden: Tensor
    document_index: Tensor
    byte_ends: Tensor


def kept_host_states(
    host: HFModel, documents: Sequence[bytes], label: str, progress: Progress
) -> HostStates:
    """The same as `host_states`, run once for each host and kept in TRIMTAB_HOME.

    Adapters come with the same neutral text, so that the second one finds its seat at once.

    Args:
        host: The host, as it lies on disk and without a preamble.
        documents: As `host_states`.
        label: As `host_states`.
        progress: As `host_states`.

    Raises:
        StorageError: The disk is full or the folder cannot be written.
    """
    asked = [_VERSION, host.source, str(host.fingerprint), str(host.model.dtype)]
    digest = hashlib.sha256(json.dumps(asked).encode())
    for document in documents:
        digest.update(len(document).to_bytes(8, "big") + document)
    path = trimtab_home() / "probes" / f"{digest.hexdigest()}.safetensors"
    try:
        return HostStates(**load_file(path))
    except (FileNotFoundError, SafetensorError, TypeError):
        states = host_states(host, documents, label, progress)
    path.parent.mkdir(parents=True, exist_ok=True)
    with writing_atomically(path) as temp:
        save_file({k: v.contiguous() for k, v in vars(states).items()}, temp)
    return states


def host_states(
    host: HFModel, documents: Sequence[bytes], label: str, progress: Progress
) -> HostStates:
    """Run a host over documents, in windows.

    Args:
        host: The host.
        documents: UTF-8; a cut character at an end is left out.
        label: What the progress display says.
        progress: Counts host tokens.
    """
    encoded = [host.encode(document.decode("utf-8", "ignore")) for document in documents]
    parts = []
    with progress(label, sum(map(len, encoded))) as advance:
        for ids in encoded:
            for states in _windows(host, ids):
                parts.append(states)
                advance(len(states))
    lengths, spare = token_lengths(host.vocabulary), int(host.vocabulary.prefix_space)
    nothing = torch.zeros(0, dtype=torch.long)
    numbered = [torch.full((len(ids),), number) for number, ids in enumerate(encoded)]
    ends = [lengths[torch.tensor(ids, dtype=torch.long)].cumsum(0) - spare for ids in encoded]
    return HostStates(
        torch.tensor([i for ids in encoded for i in ids], dtype=torch.long),
        torch.cat(parts) if parts else torch.zeros(0, host.unembedding.weight.shape[1]),
        torch.cat([nothing, *numbered]),
        torch.cat([nothing, *ends]),
    )


def _windows(host: HFModel, ids: list[int]) -> list[Tensor]:
    context = host.context_ids()
    window = min(WINDOW_TOKENS, (host.max_tokens or WINDOW_TOKENS) - len(context))
    stride = max(1, window - CONTEXT_TOKENS)
    parts = []
    for start, first, end in passages(len(ids), window, stride):
        with torch.inference_mode():
            states = host.hidden(torch.tensor([context + ids[start:end]]))[0]
        parts.append(states[len(context) + first - start :].cpu())
    return parts


def same_bytes(documents: Tensor, byte_ends: Tensor, states: HostStates) -> tuple[Tensor, Tensor]:
    """Positions of a small model and a host that have read the same bytes of the same document.

    Args:
        documents: The small model's documents, shape [positions of small].
        byte_ends: Bytes that it has read of them, shape [positions of small].
        states: The host's.

    Returns:
        Positions of the small model and of the host, both of shape [pairs].
    """
    keys = zip(documents.tolist(), byte_ends.tolist(), strict=True)
    place = {key: row for row, key in enumerate(keys)}
    host_keys = zip(states.document_index.tolist(), states.byte_ends.tolist(), strict=True)
    pairs = [(place[key], row) for row, key in enumerate(host_keys) if key in place]
    both = torch.tensor(pairs, dtype=torch.long).reshape(-1, 2)
    return both[:, 0], both[:, 1]
