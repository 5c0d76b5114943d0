"""Open a GGUF file as a host that runs in llama.cpp."""

from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoTokenizer

from trimtab.backends.gguf import UNEMBEDDING_NAME, described_folder
from trimtab.backends.heads import read_unembedding
from trimtab.backends.hf import HFModel
from trimtab.backends.llamacpp.engine import Engine
from trimtab.backends.llamacpp.lora import write_expert
from trimtab.backends.llamacpp.model import EngineModel
from trimtab.backends.tokenizers import read_vocabulary
from trimtab.errors import ModelError
from trimtab.types import Progress

HEAD_TOLERANCE = 0.05
"""Largest difference between llama.cpp's logits and those of its states under the dequantised
head, as a share of the largest logit. llama.cpp rounds the states too before it multiplies them
with a quantised head (1.3 % was measured); a scale or soft-cap that was overlooked is above."""


def open_llamacpp(
    ref: str, arithmetic: torch.dtype, *, in_float32: bool, progress: Progress
) -> HFModel:
    """Open a host in llama.cpp, mapped from its file and as quantised as that is.

    Of the file only the head, the tokenizer and the configuration are unpacked, once.

    Args:
        ref: llamacpp:FILE.gguf.
        arithmetic: Of the head's copy in torch.
        in_float32: Attend in float32, not in float16.
        progress: Shows the unpacking.

    Raises:
        MissingDependencyError: llama-cpp-python is not installed.
        ModelError: There is no such file, or it cannot be read.
    """
    path = _path(ref)
    if not path.is_file():
        raise ModelError(f"there is no file {path}", hint="give llamacpp:FILE.gguf")
    engine = Engine(path, in_float32=in_float32)
    folder = described_folder(path, progress)
    options: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    config = AutoConfig.from_pretrained(folder, **options)
    head = _head(load_file(folder / UNEMBEDDING_NAME), arithmetic)
    model = EngineModel(config, engine, head)
    model.eval()
    tokenizer = AutoTokenizer.from_pretrained(folder, **options)
    vocabulary = read_vocabulary(tokenizer, len(head.weight))
    opened = HFModel(
        ref,
        model,
        tokenizer,
        vocabulary,
        read_unembedding(model),
        source=_source(path, in_float32),
    )
    _check(opened, engine)
    return opened


def with_expert(reference: HFModel, folder: Path) -> HFModel:
    """The same model with an expert's LoRA beside its weights.

    Args:
        reference: In llama.cpp.
        folder: PEFT folder of the LoRA.

    Raises:
        AdapterError: The LoRA is broken or cannot stand beside this file's weights.
        ModelError: llama.cpp does not take it.
        StorageError: There is no room for a copy of it, which llama.cpp reads.
    """
    plain = reference.model
    assert isinstance(plain, EngineModel)
    base = _path(reference.ref)
    with TemporaryDirectory() as temp:
        file = Path(temp) / "expert.gguf"
        write_expert(folder, base, plain.config, file)
        engine = plain.trunk.engine.with_lora(file)
    model = EngineModel(plain.config, engine, plain.lm_head)
    model.eval()
    return replace(reference, model=model, unembedding=read_unembedding(model), source=None)


def _path(ref: str) -> Path:
    return Path(ref.partition(":")[2]).expanduser()


def _head(tensors: dict[str, Tensor], arithmetic: torch.dtype) -> nn.Linear:
    weight, bias = tensors["weight"], tensors.get("bias")
    head = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
    head.weight = nn.Parameter(weight.to(arithmetic), requires_grad=False)
    if bias is not None:
        head.bias = nn.Parameter(bias.to(arithmetic), requires_grad=False)
    return head


def _check(opened: HFModel, engine: Engine) -> None:
    """Make sure that llama.cpp's states are what the head reads, and its logits what comes out."""
    shape = tuple(opened.unembedding.weight.shape)
    if shape != (engine.vocab_size, engine.hidden_size):
        raise ModelError(
            f"the head of {opened.ref} has shape {list(shape)}, and llama.cpp has"
            f" {engine.vocab_size} tokens and {engine.hidden_size} hidden features",
            hint="open the file in torch: leave llamacpp: out",
        )
    read = opened.read(torch.tensor([[*opened.context_ids(), 3, 5, 7]]))
    assert read.logits is not None
    ours, own = opened.unembedding.logits(read.hidden).float(), read.logits
    worst, size = float((ours - own).abs().max()), float(own.abs().max())
    if not worst <= HEAD_TOLERANCE * size:
        raise ModelError(
            f"the logits of {opened.ref} cannot be told from its hidden states: they differ by up"
            f" to {worst:.3g} (expected at most {HEAD_TOLERANCE * size:.3g}), so its head does"
            " something unknown",
            hint="open the file in torch: leave llamacpp: out",
        )


def _source(path: Path, in_float32: bool) -> str:
    """Names the weights and the arithmetic, for what is kept of a host."""
    stat = path.stat()
    attention = "float32" if in_float32 else "float16"
    return f"llamacpp {attention} {path.resolve()} {stat.st_size} {stat.st_mtime_ns}"
