"""Memories joined in RAM: the reference for what is streamed into a file."""

from collections.abc import Sequence
from dataclasses import replace

import torch

from trimtab.carriers.memory import Memory, joined_text


def joined(memory: Memory, more: Sequence[Memory]) -> Memory:
    """A memory with the entries of others behind its own; its gates stay."""
    text, positions, sources = joined_text(memory, more)
    keys = torch.cat([memory.keys, *(other.keys for other in more)])
    return replace(memory, keys=keys, text=text, positions=positions, sources=sources)
