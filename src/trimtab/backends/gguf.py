"""GGUF files: unpacked once into an ordinary model folder, then opened from there."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, final

import gguf
import numpy as np
import torch
from safetensors.torch import save_file
from tokenizers import pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GgufConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    modeling_gguf_pytorch_utils,
)

from trimtab.errors import ModelError, TrimtabError
from trimtab.store.files import replace_directory, sha256_file
from trimtab.store.home import trimtab_home
from trimtab.types import Progress

UNEMBEDDING_NAME = "unembedding.safetensors"
"""The head's weight and bias in a folder that describes a model."""

_MAGIC = b"GGUF"
_STRING = gguf.GGUFValueType.STRING
_LAYOUT = "1"
"""Raised when the unpacked folder of the same file would come out differently."""

_SPLITS = {
    "smollm": pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    ),
}
"""Word splitting by `tokenizer.ggml.pre` where transformers does not restore it."""


@final
class PlainReader(gguf.GGUFReader):
    """gguf's reader over a plain array, which cuts long lists at once.

    As memmap, a million small slices take minutes; one by one, those of a vocabulary seconds.
    """

    @property
    def data(self) -> np.ndarray:
        """The file's bytes, still mapped from disk."""
        return self._plain

    @data.setter
    def data(self, mapped: np.ndarray) -> None:
        self._plain = mapped.view(np.ndarray)

    def _get_field_parts(
        self, orig_offs: int, raw_type: int
    ) -> tuple[int, list[Any], list[int], list[gguf.GGUFValueType]]:
        items = self._items(orig_offs) if raw_type == gguf.GGUFValueType.ARRAY else None
        if items is None:
            return super()._get_field_parts(orig_offs, raw_type)
        kind, count, parts, each = items
        # Of an item the last part is its value, and two before all items are their kind and number.
        places = range(1 + each, 2 + each * count, each)
        size = sum(part.nbytes for part in parts)
        return size, parts, list(places), [gguf.GGUFValueType.ARRAY, kind]

    def _items(self, start: int) -> tuple[gguf.GGUFValueType, int, list[np.ndarray], int] | None:
        """An array's kind, length, parts, and how many of these each item has; None if not flat."""
        if self.byte_order != "I":
            return None
        data = self._plain
        head = [
            data[start : start + 4].view(np.uint32),
            data[start + 4 : start + 12].view(np.uint64),
        ]
        kind, count, place = gguf.GGUFValueType(int(head[0][0])), int(head[1][0]), start + 12
        number = self.gguf_scalar_to_np.get(kind)
        if not count or (number is None and kind != _STRING):
            return None
        if number is not None:
            values = self._get(place, number, count)
            return kind, count, [*head, *values.reshape(-1, 1)], 1
        parts = head
        for _ in range(count):
            length = data[place : place + 8].view(np.uint64)
            text = data[place + 8 : place + 8 + int(length[0])]
            parts += (length, text)
            place += 8 + len(text)
        return kind, count, parts, 2


@contextmanager
def _read_once() -> Iterator[None]:
    """Have transformers parse a GGUF file's header once, not four times, and draw no bar.

    It offers no way to pass a parsed header on, so the names that it looks up are replaced
    inside: the reader, the table of tensor names (which it makes anew for each module of the
    model) and the decoding of strings. A small model takes a quarter of the time.
    """
    module: Any = modeling_gguf_pytorch_utils
    library: Any = gguf
    replaced = {
        (library, "GGUFReader"): cache(PlainReader),
        (library, "get_tensor_name_map"): cache(gguf.get_tensor_name_map),
        (module, "_gguf_parse_value"): _strings_at_once(module._gguf_parse_value),
        (module, "tqdm"): lambda tensors, **_: tensors,
    }
    before = {place: getattr(*place) for place in replaced}
    try:
        for place, value in replaced.items():
            setattr(*place, value)
        yield
    finally:
        for place, value in before.items():
            setattr(*place, value)


def _strings_at_once(parse: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    """A parser of values that decodes a string as a whole, not byte by byte."""

    def parsed(value: np.ndarray, kinds: list[int]) -> Any:
        return bytes(value).decode() if kinds[-1] == _STRING else parse(value, kinds)

    return parsed


def converted_folder(path: Path, progress: Progress) -> Path:
    """Give the model folder of a GGUF file, unpacking the file if that was not done before.

    The folder lies in Trimtab's home under the file's sha256, with float32 weights, so that
    nothing but the quantisation itself is lost.

    Args:
        path: A GGUF file.
        progress: Shows the unpacking.

    Raises:
        ModelError: The file is not a GGUF file, is broken, or of an unknown architecture.
        StorageError: The disk is full or the cache cannot be written.
    """
    _check_magic(path)
    folder = trimtab_home() / "models" / f"gguf{_LAYOUT}-{sha256_file(path)}"
    if not (folder / "config.json").is_file():
        with replace_directory(folder, marker="config.json") as fresh:
            _convert(path, fresh, progress)
    return folder


def described_folder(path: Path, progress: Progress) -> Path:
    """Give a folder with a model's configuration, tokenizer and head, but no other weights.

    It lies in Trimtab's home like that of `converted_folder`, and is small: a model that runs
    elsewhere, as quantised as its file is, is not unpacked.

    Args:
        path: A GGUF file.
        progress: Shows the unpacking.

    Raises:
        ModelError: As `converted_folder`.
        StorageError: The disk is full or the cache cannot be written.
    """
    _check_magic(path)
    folder = trimtab_home() / "models" / f"head{_LAYOUT}-{sha256_file(path)}"
    if not (folder / "config.json").is_file():
        with (
            replace_directory(folder, marker="config.json") as fresh,
            progress(f"unpacking the head of {path.name} (once; steps)", 3) as advance,
            _reading(path),
        ):
            _read_tokenizer(path).save_pretrained(fresh)
            advance(1)
            save_file(_read_head(path), fresh / UNEMBEDDING_NAME)
            advance(1)
            options: dict[str, Any] = {"gguf_file": path.name, "trust_remote_code": False}
            AutoConfig.from_pretrained(path.parent, **options).save_pretrained(fresh)
            advance(1)
    return folder


def _read_head(path: Path) -> dict[str, torch.Tensor]:
    """The output matrix and its bias, in float32; the embedding where a file has no such matrix."""
    found = {tensor.name: tensor for tensor in gguf.GGUFReader(str(path)).tensors}
    weight = found.get("output.weight", found.get("token_embd.weight"))
    if weight is None:
        raise ModelError(
            f"{path} has no output matrix", hint="use a file with the whole language model"
        )
    named = {"weight": weight, "bias": found.get("output.bias")}
    return {
        name: torch.from_numpy(
            gguf.dequantize(tensor.data, tensor.tensor_type).astype(np.float32, copy=True)
        )
        for name, tensor in named.items()
        if tensor is not None
    }


def _check_magic(path: Path) -> None:
    with open(path, "rb") as file:
        start = file.read(len(_MAGIC))
    if start != _MAGIC:
        raise ModelError(
            f"{path} is not a GGUF file: it begins with {start!r}, expected {_MAGIC!r}",
            hint="download the file again, or give a folder in transformers' format",
        )


def _convert(path: Path, folder: Path, progress: Progress) -> None:
    with progress(f"unpacking {path.name} (once; steps)", 3) as advance:
        with _reading(path):
            model = _read_model(path)
            advance(1)
            tokenizer = _read_tokenizer(path)
            advance(1)
        tokenizer.save_pretrained(folder)
        model.save_pretrained(folder)
        advance(1)


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Say in words what is wrong with a file that cannot be read inside."""
    try:
        with _read_once():
            yield
    except TrimtabError:
        raise
    except Exception as error:
        # A broken file shows as whatever the parser met first.
        raise ModelError(
            f"the GGUF file {path} cannot be read: {type(error).__name__}: {error}",
            hint="download it again, or use a file of another architecture or quantisation",
        ) from error


def _read_model(path: Path) -> PreTrainedModel:
    options: dict[str, Any] = {"gguf_file": path.name, "trust_remote_code": False}
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        path.parent,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.float32,
        output_loading_info=True,
        **options,
    )
    model, report = loaded
    if report["missing_keys"]:
        missing = sorted(report["missing_keys"])
        raise ModelError(
            f"{path} lacks {len(missing)} of the model's weights, for example {missing[0]}",
            hint="download the file again, or use a file with the whole model",
        )
    return model


def _read_tokenizer(path: Path) -> PreTrainedTokenizerBase:
    tokenizer = AutoTokenizer.from_pretrained(
        path.parent, gguf_file=path.name, trust_remote_code=False
    )
    field = gguf.GGUFReader(str(path)).fields.get("tokenizer.ggml.pre")
    split = _SPLITS.get(field.contents()) if field else None
    if split is not None:
        tokenizer.backend_tokenizer.pre_tokenizer = split
    return tokenizer
