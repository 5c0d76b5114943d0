"""Each form of an export: written, read back, and measured as it lies on disk."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Protocol

import torch
from pydantic import JsonValue
from torch import Tensor

from trimtab.backends.hf import HFModel
from trimtab.carriers.head import MountedHead
from trimtab.config import ExportConfig, ExportKind
from trimtab.exporting.engines import (
    is_cohere,
    is_gemma,
    merged_notes,
    vllm_notes,
)
from trimtab.exporting.linear import ConstantReading, Lora, Shift, as_lora, shift_of
from trimtab.exporting.llamacpp import (
    ADAPTER_NAME,
    HOST_NAME,
    architecture,
    check_output,
    host_file,
    read_lora,
    write_head,
    write_untied,
)
from trimtab.exporting.measured import Measured, ProbeStates, host_logits, measure
from trimtab.exporting.merged import bias_name, read_merged, write_merged
from trimtab.exporting.onnx import GRAPH_NAME, read_graph, write_graph
from trimtab.exporting.peft import bias_scale, read_peft, write_peft
from trimtab.exporting.usage import gguf_usage, merged_usage, onnx_usage, peft_usage
from trimtab.store.adapter_schema import Blend


@dataclass(frozen=True)
class Job:
    """What is to be exported.

    Attributes:
        config: Form and settings.
        host: The host.
        head: The head, mounted on it.
        states: The host's states on the probe text.
        blend: How `trimtab generate` weighs the head against the host.
    """

    config: ExportConfig
    host: HFModel
    head: MountedHead
    states: ProbeStates
    blend: Blend

    @cached_property
    def shift(self) -> Shift:
        """What the mounted head adds to the host's logits, strength included."""
        return shift_of(self.head, self.config.strength)


@dataclass(frozen=True)
class Written:
    """What was written.

    Attributes:
        measured: The files' logits against the mounted head's.
        settings: What the form decides, by name.
        notes: Approximations and refusals, in plain words.
        usage: Markdown that says how the engine loads it.
    """

    measured: Measured
    settings: dict[str, JsonValue]
    notes: tuple[str, ...]
    usage: str


class Writer(Protocol):
    """Writes one form into a folder."""

    def __call__(self, job: Job, folder: Path) -> Written:
        """Write it, read it back, measure it."""
        ...


def write(job: Job, folder: Path) -> Written:
    """Write the form that the configuration asks for.

    Args:
        job: What is to be exported.
        folder: Where to; it exists and is empty.

    Raises:
        ModelError: The form cannot express the head on this host.
        MissingDependencyError: The form needs a package that is not installed.
        StorageError: The folder cannot be written.
    """
    return _WRITERS[job.config.to](job, folder)


def _write_peft(job: Job, folder: Path) -> Written:
    host, shift = job.host, job.shift
    constant = None if job.config.lora_bias else job.states.constant()
    lora = as_lora(shift, scale=host.unembedding.scale, constant=constant)
    padded = lora.padded()
    inside = shift.offset / bias_scale(host) if job.config.lora_bias else None
    write_peft(folder, host, padded, inside)
    found, bias = read_peft(folder, host)
    measured = _measured_lora(job, found, bias)
    refused = vllm_notes(host, padded.rank)
    notes = [*_constant_notes(measured, constant), *refused]
    if job.config.lora_bias:
        notes = [
            "the head's constant part is a lora_bias: peft loads it, vLLM and llama.cpp do not"
        ]
    settings: dict[str, JsonValue] = {
        "rank": lora.rank,
        "rank with its padding": padded.rank,
        "lora_bias": job.config.lora_bias,
    }
    usage = peft_usage(
        host.ref,
        padded.rank,
        is_encoder_decoder=host.is_encoder_decoder,
        peft_alone=job.config.lora_bias or host.is_encoder_decoder,
        in_vllm=not refused,
    )
    return Written(measured, settings, tuple(notes), usage)


def _measured_lora(job: Job, lora: Lora, bias: Tensor | None) -> Measured:
    host, scale = job.host, job.host.unembedding.scale

    def exported(hidden: Tensor) -> Tensor:
        added = scale * (hidden.float() @ lora.lora_a.T @ lora.lora_b.T)
        if bias is not None:
            added = added + bias_scale(host) * bias
        return host_logits(host, hidden) + added

    return measure(host, job.shift, exported, job.states.judged)


def _constant_notes(measured: Measured, constant: ConstantReading | None) -> Sequence[str]:
    """How the head's constant part was kept, in plain words."""
    if constant is None:
        return ()
    return (
        "the head shifts some logits by the same amount everywhere, which a matrix alone cannot;"
        " what in the host's state is nearest to a constant stands in for it (off by"
        f" {constant.rms_error:.2%} in the mean). That costs a mean KL of"
        f" {measured.export.mean_kl_nats:.2g} nats; without that part"
        f" {measured.offset.mean_kl_nats:.2g} nats would be lost",
    )


def _write_gguf(job: Job, folder: Path) -> Written:
    host = job.host
    needs_copy, arch = check_output(host), architecture(host)
    constant = job.states.constant()
    lora = as_lora(job.shift, scale=host.unembedding.scale, constant=constant)
    write_head(folder / ADAPTER_NAME, f"trimtab head on {Path(host.ref).name}", arch, lora)
    measured = _measured_lora(job, read_lora(folder / ADAPTER_NAME), None)
    settings: dict[str, JsonValue] = {"rank": lora.rank, "architecture": arch}
    notes = [*_constant_notes(measured, constant)]
    source = host_file(host)
    if needs_copy and source is not None:
        write_untied(source, folder / HOST_NAME)
        settings["host_gguf"] = HOST_NAME
        notes.append(
            f"{source.name} shares its head with its embedding, and llama.cpp has then no output"
            f" matrix that a LoRA could name: {HOST_NAME} is a copy that has one"
        )
    usage = gguf_usage(host.ref, ADAPTER_NAME, HOST_NAME if needs_copy else None)
    return Written(measured, settings, tuple(notes), usage)


def _write_merged(job: Job, folder: Path) -> Written:
    host, shift = job.host, job.shift
    has_bias, was_tied = bias_name(host) is not None, _is_tied(host)
    constant = None if has_bias else job.states.constant()
    lora = as_lora(shift, scale=host.unembedding.scale, constant=constant)
    write_merged(folder, host, lora, shift.offset if has_bias else None)
    found = read_merged(folder, host)

    def exported(hidden: Tensor) -> Tensor:
        return found.logits(hidden).float()

    measured = measure(host, shift, exported, job.states.judged)
    notes = [*_constant_notes(measured, constant), *merged_notes(host, was_tied=was_tied)]
    settings: dict[str, JsonValue] = {
        "weights": str(found.weight.dtype).removeprefix("torch."),
        "head and embedding": "untied here" if was_tied else "were untied already",
    }
    if found.weight.dtype is not torch.float32:
        notes.append(
            f"the weights are {settings['weights']}, to which the whole head is rounded; --dtype"
            " float32 writes them twice as large and without that loss"
        )
    usage = merged_usage(
        in_vllm=not is_cohere(host),
        in_llamacpp=not is_cohere(host) and not (was_tied and is_gemma(host)),
    )
    return Written(measured, settings, tuple(notes), usage)


def _is_tied(host: HFModel) -> bool:
    embedding = host.model.get_input_embeddings()
    return host.unembedding.weight is embedding.weight


def _write_onnx(job: Job, folder: Path) -> Written:
    host, strength = job.host, job.config.strength
    write_graph(folder / GRAPH_NAME, shift_of(job.head, 1.0), strength)
    run = read_graph(folder / GRAPH_NAME)

    def exported(hidden: Tensor) -> Tensor:
        trust = torch.full((len(hidden),), 0.5)
        given = {"hidden": hidden.float(), "logits": host_logits(host, hidden), "trust": trust}
        return run(given)[0]

    measured = measure(host, job.shift, exported, job.states.judged)
    blend = job.blend
    usage = onnx_usage(
        GRAPH_NAME,
        strength,
        1 - blend.host_prior,
        blend.share,
        is_encoder_decoder=host.is_encoder_decoder,
    )
    return Written(measured, {"rank": len(job.shift.down)}, (), usage)


_WRITERS: Mapping[ExportKind, Writer] = {
    "peft": _write_peft,
    "gguf": _write_gguf,
    "merged": _write_merged,
    "onnx": _write_onnx,
}
