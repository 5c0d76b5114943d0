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
from trimtab.store.home import trimtab_home
from trimtab.text.passages import passages
from trimtab.types import Progress

WINDOW_TOKENS = 512
"""Host tokens that are run at once; fewer where the host's positions end before."""

CONTEXT_TOKENS = 64
"""Tokens of context that each window but the first repeats."""

TARGET_TOKENS, TARGET_CONTEXT_TOKENS = 96, 16
"""The same for an encoder-decoder, whose targets are sentences or paragraphs."""

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
    version = [_VERSION, TARGET_TOKENS] if host.is_encoder_decoder else [_VERSION]
    asked = [*version, host.source, str(host.fingerprint), str(host.model.dtype)]
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

    An encoder-decoder writes each window as a target whose source is that window itself: without
    a source its states are those of a model that has nothing to say.

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
    size, repeated = WINDOW_TOKENS, CONTEXT_TOKENS
    if host.is_encoder_decoder:
        size, repeated = TARGET_TOKENS, TARGET_CONTEXT_TOKENS
    window = min(size, (host.max_tokens or size) - len(context))
    stride = max(1, window - repeated)
    parts = []
    for start, first, end in passages(len(ids), window, stride):
        read, source = torch.tensor([context + ids[start:end]]), _source(host, ids[start:end])
        with torch.inference_mode():
            states = host.hidden(read, encoder_ids=source)[0]
        parts.append(states[len(context) + first - start :].cpu())
    return parts


def _source(host: HFModel, ids: list[int]) -> Tensor | None:
    """What an encoder-decoder reads to write some tokens: their text, as far as it can be read."""
    if not host.is_encoder_decoder:
        return None
    text = b"".join(host.vocabulary.token_bytes[i] or b"" for i in ids)
    read = host.encode_source(text.decode("utf-8", "ignore").strip(), cut=True)
    return torch.tensor([read])


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
