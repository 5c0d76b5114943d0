"""A LoRA on the host's output matrix as a GGUF adapter, and a host that has such a matrix."""

from pathlib import Path

import gguf
import numpy as np
import torch

from trimtab.backends.gguf import PlainReader
from trimtab.backends.hf import HFModel
from trimtab.backends.llamacpp.lora import write_lora
from trimtab.errors import ModelError
from trimtab.exporting.linear import Lora
from trimtab.store.storage_errors import storage_errors

ADAPTER_NAME = "head.gguf"
"""File of the LoRA."""

HOST_NAME = "host-untied.gguf"
"""File of the host's copy with an output matrix of its own."""

_OUTPUT, _EMBEDDING = "output.weight", "token_embd.weight"

_ARCHITECTURES = {
    "llama": "llama",
    "mistral": "llama",
    "mixtral": "llama",
    "qwen2": "qwen2",
    "qwen2_moe": "qwen2moe",
    "qwen3": "qwen3",
    "qwen3_moe": "qwen3moe",
    "gemma": "gemma",
    "gemma2": "gemma2",
    "gemma3": "gemma3",
    "gemma3_text": "gemma3",
    "gpt2": "gpt2",
    "gpt_neox": "gptneox",
    "phi3": "phi3",
    "granite": "granite",
    "cohere": "command-r",
    "cohere2": "cohere2",
    "olmo2": "olmo2",
    "smollm3": "smollm3",
}
"""llama.cpp's name of an architecture by transformers' model_type, for hosts that are no GGUF."""


def host_file(host: HFModel) -> Path | None:
    """The GGUF file that the host was opened from; None for a folder or a hub name."""
    path = Path(host.ref).expanduser()
    return path if path.suffix == ".gguf" and path.is_file() else None


def check_output(host: HFModel) -> bool:
    """Tell whether the host's own GGUF file lacks an output matrix that an adapter could name.

    llama.cpp crashes or refuses where a LoRA names the output matrix of a host that shares it with
    the embedding, and a LoRA on the embedding would change what the host reads.

    Raises:
        ModelError: llama.cpp reads no output matrix of this architecture; or the host is tied and
            not given as a GGUF file, so that no untied copy of it can be written.
    """
    arch, path = architecture(host), host_file(host)
    if not reads_output(arch):
        raise ModelError(
            f"llama.cpp takes the head of {host.ref} from its embedding, as of every {arch} model,"
            " also where the model has a head of its own: there is no output matrix that a LoRA"
            " could name, and a GGUF file with one is refused there",
            hint="use --to peft or --to merged in transformers, --to onnx, or `trimtab generate`",
        )
    if path is not None:
        return all(tensor.name != _OUTPUT for tensor in _read(path).tensors)
    head, embedding = host.model.get_output_embeddings(), host.model.get_input_embeddings()
    if head is not None and head.weight is embedding.weight:
        raise ModelError(
            f"{host.ref} shares its head with its embedding, and llama.cpp has then no output"
            " matrix that a LoRA could name",
            hint="give the host as a GGUF file, of which an untied copy is written; or use --to"
            " merged and convert that folder with llama.cpp's convert_hf_to_gguf.py",
        )
    return False


def reads_output(arch: str) -> bool:
    """Whether llama.cpp reads an output matrix from files of an architecture, as its list says.

    Args:
        arch: llama.cpp's name of the architecture; one that its list lacks is taken to have one.
    """
    names = {name: key for key, name in gguf.MODEL_ARCH_NAMES.items()}
    return arch not in names or gguf.MODEL_TENSOR.OUTPUT in gguf.MODEL_TENSORS[names[arch]]


def architecture(host: HFModel) -> str:
    """llama.cpp's name of the host's architecture; an adapter of another one is refused there.

    Raises:
        ModelError: It is not known.
    """
    path = host_file(host)
    if path is not None:
        return _architecture(_read(path), path)
    family = host.model.config.get_text_config(decoder=True).model_type
    if family not in _ARCHITECTURES:
        raise ModelError(
            f"llama.cpp's name for the family {family} of {host.ref} is not known",
            hint="give the host as a GGUF file, which says it, or use --to merged",
        )
    return _ARCHITECTURES[family]


def write_head(path: Path, name: str, arch: str, lora: Lora) -> None:
    """Write the LoRA as a GGUF adapter; llama.cpp takes any rank.

    Args:
        path: File to write.
        name: Name in its header.
        arch: llama.cpp's name of the host's architecture.
        lora: The matrix.

    Raises:
        StorageError: The file cannot be written.
    """
    write_lora(path, arch, {_OUTPUT: (lora.lora_a.numpy(), lora.lora_b.numpy())}, name=name)


def read_lora(path: Path) -> Lora:
    """Read back what `write_head` wrote."""
    found = {tensor.name: tensor.data for tensor in gguf.GGUFReader(str(path)).tensors}
    sides = (torch.from_numpy(np.array(found[f"{_OUTPUT}.lora_{side}"])) for side in "ab")
    return Lora(*sides)


def write_untied(source: Path, target: Path) -> None:
    """Copy a host's GGUF file and give it an output matrix: its embedding's numbers, as they are.

    The copy gives the host's own logits. It is larger by one embedding.

    Args:
        source: A GGUF file without an output matrix.
        target: File to write.

    Raises:
        StorageError: The file cannot be written.
    """
    reader = _read(source)
    writer = gguf.GGUFWriter(None, _architecture(reader, source), endianess=reader.endianess)
    alignment = reader.get_field(gguf.Keys.General.ALIGNMENT)
    if alignment is not None:
        writer.data_alignment = alignment.contents()
    for field in reader.fields.values():
        if field.name == gguf.Keys.General.ARCHITECTURE or field.name.startswith("GGUF."):
            continue
        kind = field.types[0]
        inner = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(field.name, field.contents(), kind, sub_type=inner)
    tensors = [(tensor.name, tensor) for tensor in reader.tensors]
    tensors += [(_OUTPUT, tensor) for name, tensor in tensors if name == _EMBEDDING]
    for name, tensor in tensors:
        data = tensor.data
        writer.add_tensor_info(name, data.shape, data.dtype, data.nbytes, tensor.tensor_type)
    with storage_errors(target):
        writer.write_header_to_file(target)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for _, tensor in tensors:
            writer.write_tensor_data(tensor.data)
        writer.close()


def _read(path: Path) -> gguf.GGUFReader:
    return PlainReader(str(path))


def _architecture(reader: gguf.GGUFReader, path: Path) -> str:
    field = reader.get_field(gguf.Keys.General.ARCHITECTURE)
    if field is None:
        raise ModelError(
            f"the GGUF file {path} does not say its architecture",
            hint="download it again, or convert the model anew",
        )
    return str(field.contents())
