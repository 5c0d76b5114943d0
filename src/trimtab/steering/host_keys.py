"""A memory under a host's own states: it reads the memory's text once, and needs no map."""

from dataclasses import replace

import torch

from trimtab.backends.hf import HFModel
from trimtab.carriers.memory import Memory, documents_of, unit_keys, varies, whitening
from trimtab.errors import AdapterError
from trimtab.steering.host_states import host_states
from trimtab.store.seats import HostKeys
from trimtab.types import Progress


def host_keys(memory: Memory, host: HFModel, progress: Progress) -> HostKeys:
    """Make a host the owner of a memory's keys.

    The map from a host's states to the small model's blurs them; a host that has read the text
    itself finds what means the same to it. It costs one pass of the host over the memory's text,
    and trains nothing. Entries lie at the host's own tokens.

    Args:
        memory: Of the adapter.
        host: The host.
        progress: Shows the pass.

    Raises:
        AdapterError: The memory's text is no two tokens of the host in a row, or its states do not
            differ.
    """
    documents, starts = documents_of(memory.text)
    states = host_states(host, documents, "reading the memory's text", progress)
    index = states.document_index
    followed = torch.nonzero(index[1:] == index[:-1])[:, 0]
    hidden = states.hidden[followed].float()
    if not len(followed) or not varies(hidden):
        raise AdapterError(
            "the memory's text is too short for keys of the host's own",
            hint="leave out --host-keys",
        )
    projection, mean = whitening(hidden, memory.keys.shape[1])
    keys = unit_keys(hidden, projection, mean)
    positions = torch.tensor(starts)[index[followed]] + states.byte_ends[followed]
    return HostKeys(keys, projection, mean, positions, states.token_ids[followed + 1])


def shuffled(keys: HostKeys, seed: int) -> HostKeys:
    """The control: each key stands before what followed another."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(keys.keys), generator=generator)
    return replace(keys, keys=keys.keys[order])
