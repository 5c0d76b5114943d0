"""An expert's LoRA as llama.cpp reads one: a GGUF adapter beside the file of its base model."""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray
from safetensors.torch import load_file
from transformers import PreTrainedConfig, modeling_gguf_pytorch_utils

from trimtab.backends.gguf import PlainReader
from trimtab.backends.llamacpp.library import IN_TORCH
from trimtab.carriers.expert import FETCH_AGAIN, WEIGHTS_NAME, read_lora_config, weight_names
from trimtab.errors import AdapterError
from trimtab.light_peft import LoraConfig
from trimtab.store.storage_errors import storage_errors

_PREFIX = "base_model.model."
_SIDES = ("lora_A", "lora_B")
_ENDS = ("output.weight", "token_embd.weight")

Matrices = tuple[NDArray[np.float32], NDArray[np.float32]]
"""Down to a LoRA's rank, [rank, in], and up again, [out, rank]."""


def write_expert(folder: Path, base: Path, config: PreTrainedConfig, target: Path) -> None:
    """Write an expert's LoRA as a GGUF adapter to the base's own file.

    Args:
        folder: PEFT folder.
        base: GGUF file of the base model.
        config: The base's, as transformers reads it from that file.
        target: File to write.

    Raises:
        AdapterError: The LoRA is broken, or changes the embeddings, the head, or a weight that the
            file does not name or keeps in an order that is not known.
        StorageError: The file cannot be written.
    """
    reader = PlainReader(str(base))
    architecture = str(reader.fields[gguf.Keys.General.ARCHITECTURE].contents())
    has = {tensor.name for tensor in reader.tensors}
    settings = config.get_text_config(decoder=True)
    names = _names(architecture, settings)
    matrices = dict[str, Matrices]()
    for module, down, up in _layers(folder):
        name = f"{names(module)}.weight"
        if name not in has or name in _ENDS:
            raise AdapterError(
                f"the LoRA in {folder} changes {module}, which cannot be changed in {base.name}",
                hint=IN_TORCH,
            )
        matrices[name] = down, up[_order(name, len(up), architecture, settings)]
    write_lora(target, architecture, matrices)


def write_lora(
    target: Path, architecture: str, matrices: Mapping[str, Matrices], *, name: str | None = None
) -> None:
    """Write a GGUF adapter in float32 that is added as it is.

    llama.cpp multiplies what a layer adds by the file's one alpha over the layer's rank. So alpha
    is the first layer's rank here, and layers of another rank are scaled to come out alike.

    Args:
        target: File to write.
        architecture: llama.cpp's name of the base's architecture; one of another is refused there.
        matrices: By the file's name of a weight, down to the rank [rank, in] and up [out, rank].
        name: Name in the header.

    Raises:
        StorageError: The file cannot be written.
    """
    writer = gguf.GGUFWriter(None, architecture)
    writer.add_type(gguf.GGUFType.ADAPTER)
    if name is not None:
        writer.add_name(name)
    alpha = next((len(down) for down, _ in matrices.values()), 1)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(alpha))
    for weight, (down, up) in matrices.items():
        writer.add_tensor(
            f"{weight}.lora_a", np.ascontiguousarray(down * np.float32(len(down) / alpha))
        )
        writer.add_tensor(f"{weight}.lora_b", np.ascontiguousarray(up))
    with storage_errors(target):
        writer.write_header_to_file(target)
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


def _layers(folder: Path) -> Iterator[tuple[str, NDArray[np.float32], NDArray[np.float32]]]:
    """Each layer that a LoRA changes: its name, and both matrices, the first with the scale."""
    config = read_lora_config(folder)
    if config.alpha_pattern:
        raise AdapterError(f"the LoRA in {folder} has another alpha for some layers", hint=IN_TORCH)
    found = weight_names(folder / WEIGHTS_NAME)
    ends = tuple(f".{side}.weight" for side in _SIDES)
    modules = sorted(
        {name.removesuffix(end) for name in found for end in ends if name.endswith(end)}
    )
    if found != {f"{module}{end}" for module in modules for end in ends}:
        raise AdapterError(
            f"the LoRA in {folder} has {len(found)} weights, expected two for each of"
            f" {len(modules)} layers",
            hint=FETCH_AGAIN,
        )
    weights = load_file(folder / WEIGHTS_NAME)
    for module in modules:
        down, up = (weights[f"{module}{end}"].float().numpy() for end in ends)
        yield module.removeprefix(_PREFIX), down * np.float32(_scale(config, len(down))), up


def _scale(config: LoraConfig, rank: int) -> float:
    return config.lora_alpha / (rank**0.5 if config.use_rslora else rank)


def _names(architecture: str, config: PreTrainedConfig) -> Callable[[str], str | None]:
    """From a layer's name in transformers to the file's, None where that has none."""
    known = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}
    if architecture not in known:
        return lambda _: None
    return gguf.get_tensor_name_map(known[architecture], int(config.num_hidden_layers)).get_name


def _order(name: str, rows: int, architecture: str, config: PreTrainedConfig) -> NDArray[np.int64]:
    """Which row of a weight in transformers each row of the file's weight is.

    A Llama's file has the rows of queries and keys in another order. Which one is asked of the
    code that reads such files for transformers, so that both always agree.

    Raises:
        AdapterError: It does more to the weight than to change its rows' order.
    """
    module: Any = modeling_gguf_pytorch_utils
    processor = module.TENSOR_PROCESSORS.get(architecture, module.TensorProcessor)
    numbered = np.arange(rows)[:, None]
    options: dict[str, Any] = {"tensor_key_mapping": {}, "parsed_parameters": {"tensors": {}}}
    try:
        found = processor(config=config.to_dict()).process(
            weights=numbered.copy(), name=name, **options
        )
        places = np.asarray(found.weights)
    except Exception as error:
        raise _unknown(name) from error
    if found.name != name or places.shape != numbered.shape:
        raise _unknown(name)
    if not np.array_equal(np.sort(places[:, 0]), numbered[:, 0]):
        raise _unknown(name)
    return np.argsort(places[:, 0])


def _unknown(name: str) -> AdapterError:
    return AdapterError(
        f"the order of {name} in a GGUF file of this family is not known", hint=IN_TORCH
    )
