"""Tune a small model on your text: the expert."""

import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers.pytorch_utils import Conv1D

from trimtab.backends.hf import HFModel, quiet_transformers
from trimtab.backends.open import one_device, open_model, resolve_dtype
from trimtab.config import TuneConfig
from trimtab.errors import InputError, ModelError
from trimtab.light_peft import (
    LoraConfig,
    PeftModel,
    disable_input_dtype_casting,
    get_peft_model,
)
from trimtab.metrics import DocumentScore, bits_per_byte
from trimtab.store.adapter_schema import BaseModelReference
from trimtab.store.expert import (
    CHECKPOINT_NAME,
    EXPERT_NAME,
    LORA_NAME,
    MODEL_NAME,
    STATE_NAME,
    ExpertManifest,
    HeldOut,
    Trial,
    UnfinishedRun,
    check_same_run,
    file_entries,
    has_trained,
    read_expert,
    read_run,
    withdraw_run,
    write_expert,
    write_run,
)
from trimtab.store.files import (
    lock,
    names_in,
    package_versions,
    refuse_others,
    replace_directory,
)
from trimtab.text.packing import Windows
from trimtab.tuning.four_bit import check_four_bit, hold_in_four_bits
from trimtab.tuning.job import Job
from trimtab.tuning.rates import learning_rate
from trimtab.tuning.training import TrainingState
from trimtab.tuning.training_text import (
    fingerprints,
    gather_documents,
    held_out_windows,
    training_windows,
)
from trimtab.types import Progress, silent


@dataclass(frozen=True)
class TuneResult:
    """What tuning gave.

    Attributes:
        folder: Folder of the expert.
        method: lora, qlora or full.
        steps: Optimiser steps taken.
        train_tokens: Tokens that the loss counted, over all steps.
        held_out: What the held-out text costs before and after; None if none was held out.
        trials: Learning rates that were tried; none where one was given.
    """

    folder: Path
    method: str
    steps: int
    train_tokens: int
    held_out: HeldOut | None
    trials: tuple[Trial, ...] = ()

    def summary(self) -> str:
        """What was done and what it brought, in two to four lines."""
        lines = [f"expert in {self.folder}: {self.train_tokens:,} tokens in {self.steps} steps"]
        if self.trials:
            best = min(self.trials, key=Trial.cost)
            lines.append(f"learning rate {best.learning_rate:g}, the best of {len(self.trials)}")
        if self.held_out is not None:
            lines.append(_comparison(self.held_out, was_tried=bool(self.trials)))
        return "\n".join(lines)


def _comparison(held_out: HeldOut, *, was_tried: bool) -> str:
    before, after = held_out.bits_per_byte_before, held_out.bits_per_byte_after
    line = (
        f"held-out text: {before:.3f} -> {after:.3f} bits per byte ({after / before - 1:+.1%}),"
        f" {held_out.nats_per_token_before:.3f} -> {held_out.nats_per_token_after:.3f} nats per"
        " token"
    )
    if held_out.has_gained:
        return line
    advice = "give it more text" if was_tried else "try a lower learning rate"
    return f"{line}\ntraining did not help: the expert is the base itself; {advice}"


def tune(config: TuneConfig, *, progress: Progress = silent) -> TuneResult:
    """Fine-tune a small model and write the expert's folder.

    An interrupted run continues at its last checkpoint and ends with the same weights, bit for
    bit on a CPU with the same number of threads; a finished folder is returned as it is.

    Args:
        config: What to train, on what, how, and where to.
        progress: Shows the training.

    Returns:
        Where the expert is and what it gained.

    Raises:
        InputError: Text that cannot be used, or a folder that holds something else or a run with
            other settings or text.
        ModelError: A model that cannot be opened or is not causal.
        NumericalError: A loss that is not a finite number; the last checkpoint stays.
        StorageError: The folder cannot be written.
    """
    if config.method == "full":
        # Nothing is tried: the record names the rate, whatever later versions take for none.
        config = config.model_copy(update={"learning_rate": config.usual_learning_rate})
    asked = UnfinishedRun(config=config, inputs=fingerprints(config))
    with lock(config.out):
        if (config.out / EXPERT_NAME).is_file():
            manifest = read_expert(config.out)
            check_same_run(config.out, manifest, asked)
        else:
            manifest = _run(asked, progress)
        # Also here, for a run that was killed between finishing and cleaning up.
        shutil.rmtree(config.out / CHECKPOINT_NAME, ignore_errors=True)
    return TuneResult(
        folder=config.out,
        method=manifest.method,
        steps=manifest.steps,
        train_tokens=manifest.train_tokens,
        held_out=manifest.held_out,
        trials=manifest.trials,
    )


def _run(asked: UnfinishedRun, progress: Progress) -> ExpertManifest:
    config = asked.config
    run = _begun(asked)
    with _withdrawn_if_refused(config.out):
        model = _open(config, progress)
        run = run if run.documents else _gathered(run, model)
        windows, held_out = training_windows(config, model), held_out_windows(config, model)
    base = BaseModelReference(
        ref=config.model,
        revision=model.revision,
        vocabulary_sha256=model.fingerprint.vocabulary_sha256,
        unembedding_sha256=model.fingerprint.unembedding_sha256,
        hidden=model.unembedding.weight.shape[1],
    )
    wrapped = _trainable(config, model)
    # Mixed precision casts each input once; PEFT would widen it to float32 and back before that.
    with disable_input_dtype_casting(wrapped) if wrapped else nullcontext():
        job = Job(config, model, windows, held_out, progress)
        rate, trials = learning_rate(run, job)
        state = job.trained(job.schedule(rate), STATE_NAME, "tuning")
    _save_weights(config, model, wrapped)
    assert run.documents is not None
    manifest = ExpertManifest(
        base=base,
        method=config.method,
        config=config,
        seed=config.seed,
        packages=package_versions(),
        inputs=run.inputs,
        documents=run.documents,
        steps=state.step,
        train_tokens=state.train_tokens,
        held_out=None if held_out is None else _held_out_metrics(held_out, state),
        learning_rate=rate,
        trials=trials,
        files=file_entries(config.out),
    )
    write_expert(config.out, manifest)
    return manifest


def _begun(asked: UnfinishedRun) -> UnfinishedRun:
    """Find the run that trained in the folder before, or begin one there."""
    folder = asked.config.out
    found = read_run(folder)
    if found is not None and has_trained(folder, found):
        check_same_run(folder, found, asked)
        return found
    others = names_in(folder)
    if found is None and others != [CHECKPOINT_NAME]:
        refuse_others(folder, others, "run of tune")
    write_run(folder, asked)
    return asked


@contextmanager
def _withdrawn_if_refused(folder: Path) -> Iterator[None]:
    """Leave no unfinished run behind where the model or the text cannot be used."""
    try:
        yield
    except (InputError, ModelError):
        run = read_run(folder)
        if run is None or not has_trained(folder, run):
            withdraw_run(folder)
        raise


def _gathered(run: UnfinishedRun, model: HFModel) -> UnfinishedRun:
    run = run.model_copy(update={"documents": gather_documents(run.config, model)})
    write_run(run.config.out, run)
    return run


def _open(config: TuneConfig, progress: Progress) -> HFModel:
    place = one_device()
    if config.method == "qlora":
        check_four_bit(place)
        # Rounded on its way to where it is trained, from half as many bytes.
        model = open_model(config.model, dtype="bfloat16", device_map="cpu", progress=progress)
    else:
        # Float32 whatever the arithmetic: mixed precision over float32 weights is both the fastest
        # on a processor with bfloat16 and exact in the residual stream.
        model = open_model(config.model, dtype="float32", device_map=place, progress=progress)
    if model.is_encoder_decoder:
        raise ModelError(
            f"{config.model} reads a source and writes a target; only causal models are tuned",
            hint="choose a causal model, for example a small Llama, Qwen, Gemma or GPT-2",
        )
    if model.max_tokens is not None and config.window_tokens > model.max_tokens:
        raise InputError(
            f"window_tokens is {config.window_tokens}, but {config.model} has positions for"
            f" {model.max_tokens}",
            hint=f"set --window-tokens to at most {model.max_tokens}",
        )
    if config.method == "qlora":
        arithmetic = resolve_dtype(config.dtype, place)
        hold_in_four_bits(model.model, arithmetic, place)
    return model


def _trainable(config: TuneConfig, model: HFModel) -> PeftModel | None:
    """Choose the weights that are trained; with LoRA, put it into the model."""
    if config.method == "full":
        model.model.requires_grad_(True)
        return None
    settings = LoraConfig(
        r=config.rank,
        lora_alpha=2 * config.rank,
        target_modules="all-linear",
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in model.model.modules()),
        task_type="CAUSAL_LM",
    )
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        # PEFT asks transformers for a property that transformers is about to rename.
        warnings.simplefilter("ignore", FutureWarning)
        # It names patterns for experts that it cannot reach; what comes of that is refused below.
        warnings.filterwarnings("ignore", r"The following \w+_pattern keys", RuntimeWarning)
        torch.manual_seed(config.seed)
        try:
            wrapped = get_peft_model(model.model, settings)
        except (ValueError, RuntimeError) as error:
            # State-space layers read weights past the modules that a LoRA would wrap.
            raise ModelError(
                f"{config.model} ({type(model.model).__name__}) cannot take a LoRA: {error}",
                hint="tune it with --method full, or take a small model of another family",
            ) from error
    _describe(wrapped, config)
    return wrapped


def _describe(wrapped: PeftModel, config: TuneConfig) -> None:
    # PEFT keeps the layers' full names as a set: other runtimes expect short names, and a set's
    # order would change from run to run.
    settings = wrapped.peft_config["default"]
    settings.base_model_name_or_path = config.model
    assert isinstance(settings, LoraConfig) and not isinstance(settings.target_modules, str)
    if settings.target_parameters:
        # PEFT does so where experts lie in one tensor; an adapter may hold linear layers alone.
        raise ModelError(
            f"{config.model} cannot take a LoRA over linear layers alone: PEFT would add to its"
            f" experts' {', '.join(sorted(settings.target_parameters))}",
            hint="tune it with --method full, or take a small model without experts",
        )
    settings.target_parameters = None
    names = {name.rpartition(".")[2] for name in settings.target_modules or ()}
    settings.target_modules = sorted(names)


def _save_weights(config: TuneConfig, model: HFModel, wrapped: PeftModel | None) -> None:
    if wrapped is not None:
        with replace_directory(config.out / LORA_NAME, marker="adapter_config.json") as folder:
            wrapped.save_pretrained(str(folder), save_embedding_layers=False)
            (folder / "README.md").unlink(missing_ok=True)
        return
    with replace_directory(config.out / MODEL_NAME, marker="config.json") as folder:
        with quiet_transformers():
            model.model.save_pretrained(folder)
        model.tokenizer.save_pretrained(folder)


def _held_out_metrics(held_out: Windows, state: TrainingState) -> HeldOut:
    tokens = int(held_out.counted.sum())
    text_bytes = int(held_out.text_bytes[held_out.counted].sum())
    before, after = state.held_out_nats[0], min(state.held_out_nats)
    return HeldOut(
        tokens=tokens,
        bytes=text_bytes,
        nats_per_token=tuple(state.held_out_nats),
        nats_per_token_before=before,
        nats_per_token_after=after,
        bits_per_byte_before=bits_per_byte([DocumentScore(before * tokens, text_bytes)]),
        bits_per_byte_after=bits_per_byte([DocumentScore(after * tokens, text_bytes)]),
    )
