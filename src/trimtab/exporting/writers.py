"""Each form of an export: written, read back, and measured as it lies on disk."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from pydantic import JsonValue
from torch import Tensor

from trimtab.backends.hf import HFModel
from trimtab.config import ExportConfig, ExportKind
from trimtab.exporting.engines import vllm_notes
from trimtab.exporting.linear import ConstantReading, Lora, Shift, as_lora
from trimtab.exporting.llamacpp import (
    ADAPTER_NAME,
    HOST_NAME,
    architecture,
    check_output,
    host_file,
    read_lora,
    write_lora,
    write_untied,
)
from trimtab.exporting.measured import Measured, ProbeStates, host_logits, measure
from trimtab.exporting.peft import bias_scale, read_peft, write_peft
from trimtab.exporting.usage import gguf_usage, peft_usage


@dataclass(frozen=True)
class Job:
    """What is to be exported.

    Attributes:
        config: Form and settings.
        host: The host.
        shift: What the mounted head adds to its logits, strength included.
        states: The host's states on the probe text.
    """

    config: ExportConfig
    host: HFModel
    shift: Shift
    states: ProbeStates


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
    notes = [*_constant_notes(measured, constant), *vllm_notes(host, padded.rank)]
    if job.config.lora_bias:
        notes = [
            "the head's constant part is a lora_bias: peft loads it, vLLM and llama.cpp do not"
        ]
    settings: dict[str, JsonValue] = {
        "rank": lora.rank,
        "rank with its padding": padded.rank,
        "lora_bias": job.config.lora_bias,
    }
    usage = peft_usage(host.ref, padded.rank, lora_bias=job.config.lora_bias)
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
        "the head has a constant part, which a matrix has not; it is carried by the feature of the"
        f" host's state that varies least ({constant.rms_error:.2%} around 1). That costs a mean KL"
        f" of {measured.export.mean_kl_nats:.2g} nats; without that part"
        f" {measured.offset.mean_kl_nats:.2g} nats would be lost",
    )


def _write_gguf(job: Job, folder: Path) -> Written:
    host = job.host
    needs_copy, arch = check_output(host), architecture(host)
    constant = job.states.constant()
    lora = as_lora(job.shift, scale=host.unembedding.scale, constant=constant)
    write_lora(folder / ADAPTER_NAME, f"trimtab head on {Path(host.ref).name}", arch, lora)
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


_WRITERS: Mapping[ExportKind, Writer] = {"peft": _write_peft, "gguf": _write_gguf}
