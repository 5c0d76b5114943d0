"""Safetensors files whose tensors are written part by part: none need be in RAM as a whole."""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor

_LENGTH_BYTES = 8
"""In which a file first says how long its header is; headers are padded to a multiple of it."""


@dataclass(frozen=True)
class Streamed:
    """A tensor that comes in parts.

    Attributes:
        dtype: Of the whole.
        shape: Of the whole.
        parts: Their bytes, one part after the other, are the whole's; each is asked for when those
            before it are written.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    parts: Iterable[Tensor]

    @property
    def bytes(self) -> int:
        """Size of the whole."""
        return math.prod(self.shape) * self.dtype.itemsize


def rows_of(parts: Sequence[Tensor]) -> Streamed:
    """The rows of several tensors behind each other, as `torch.cat` has them, but not in RAM.

    Args:
        parts: One at least; they differ in their first dimension alone.
    """
    first = parts[0]
    return Streamed(first.dtype, (sum(map(len, parts)), *first.shape[1:]), parts)


def save_streamed(path: Path, tensors: Mapping[str, Streamed]) -> None:
    """Write the file that safetensors' own `save_file` writes of the whole tensors.

    Args:
        path: The file to write.
        tensors: By name.

    Raises:
        OSError: It cannot be written.
        ValueError: The parts of a tensor are not as many bytes as its shape says.
    """
    order, header = _header(tensors)
    with open(path, "wb") as file:
        file.write(len(header).to_bytes(_LENGTH_BYTES, "little") + header)
        for name in order:
            end = file.tell() + tensors[name].bytes
            for part in tensors[name].parts:
                file.write(part.contiguous().flatten().view(torch.uint8).numpy().data)
            if file.tell() != end:
                raise ValueError(f"the parts of {name} are {file.tell() - end:+} bytes too many")


def _header(tensors: Mapping[str, Streamed]) -> tuple[list[str], bytes]:
    """The tensors' names in the order of a file, and what its header says of them."""
    # Order and names of types are those that safetensors gives empty tensors of the same types.
    empty = save({name: torch.empty(0, dtype=tensor.dtype) for name, tensor in tensors.items()})
    length = int.from_bytes(empty[:_LENGTH_BYTES], "little")
    told = json.loads(empty[_LENGTH_BYTES : _LENGTH_BYTES + length])
    begin = 0
    for name, entry in told.items():
        end = begin + tensors[name].bytes
        entry |= {"shape": list(tensors[name].shape), "data_offsets": [begin, end]}
        begin = end
    header = json.dumps(told, separators=(",", ":"), ensure_ascii=False).encode()
    return list(told), header + b" " * (-len(header) % _LENGTH_BYTES)
