"""The expert as a LoRA over its base: read from a PEFT folder, switched on and off in place."""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from functools import cached_property
from pathlib import Path
from typing import Any, final

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel

from trimtab.carriers.second_row import SecondRow
from trimtab.errors import AdapterError
from trimtab.light_peft import (
    BaseTunerLayer,
    LoraConfig,
    LoraLinear,
    PeftModel,
    get_peft_model_state_dict,
)
from trimtab.store.files import read_json

WEIGHTS_NAME = "adapter_model.safetensors"
"""Weights of a LoRA folder, PEFT's own name."""

_USED = (
    "r",
    "lora_alpha",
    "target_modules",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
    "rank_pattern",
    "alpha_pattern",
    "fan_in_fan_out",
    "use_rslora",
    "bias",
)
_IRRELEVANT = (
    "auto_mapping",
    "base_model_name_or_path",
    "inference_mode",
    "init_lora_weights",
    "lora_dropout",
    "peft_type",
    "peft_version",
    "revision",
    "task_type",
)
FETCH_AGAIN = "fetch the expert again from where it came, or tune it anew"


def read_lora_config(folder: Path) -> LoraConfig:
    """Read a LoRA's settings, of which only those of a plain LoRA are allowed.

    Some of PEFT's settings import modules by name or change more than linear layers; a folder
    made by others may not ask for these.

    Args:
        folder: PEFT folder with adapter_config.json.

    Raises:
        AdapterError: No such file, not JSON, not a LoRA, or a setting that is not supported.
    """
    raw = read_json(folder / "adapter_config.json", "LoRA configuration", error=AdapterError)
    if raw.get("peft_type") != "LORA":
        raise AdapterError(
            f"{folder} is of PEFT type {raw.get('peft_type')!r}, expected 'LORA'",
            hint="an expert is a plain LoRA; make it with `trimtab tune`",
        )
    _refuse_unsupported(raw, folder)
    try:
        return LoraConfig(**{key: raw[key] for key in _USED if key in raw}, inference_mode=True)
    except (TypeError, ValueError) as error:
        raise AdapterError(
            f"the LoRA configuration of {folder} cannot be used: {error}", hint=FETCH_AGAIN
        ) from error


def _refuse_unsupported(raw: dict[str, Any], folder: Path) -> None:
    plain = LoraConfig().to_dict()
    others = raw.keys() - set(_USED) - set(_IRRELEVANT)
    refused = sorted(key for key in others if key not in plain or raw[key] != plain[key])
    if refused:
        raise AdapterError(
            f"the LoRA in {folder} sets {', '.join(refused)}, which an expert cannot have",
            hint="make the expert with `trimtab tune`, or train a plain LoRA over linear layers",
        )


MERGED_BYTES = 2**31
"""Linear weights of a small model that are kept twice where the expert runs alone, as they are and
with the LoRA added: a second path beside each takes a fifth more time. Larger models do without."""


@final
class LoraSwitch:
    """The LoRA layers inside a model; off unless switched on, which leaves the model the base."""

    def __init__(self, model: nn.Module) -> None:
        """Find the LoRA layers of a model and switch them off."""
        self._layers = [m for m in model.modules() if isinstance(m, BaseTunerLayer)]
        for layer in self._layers:
            layer.enable_adapters(False)
        self._step_aside()

    def _step_aside(self) -> None:
        """Let the layers under those of the LoRA be called in their place.

        What PEFT's layers look at before they do the same takes a third of a small model's step.
        """
        for layer in self._layers:
            vars(layer)["forward"] = layer.get_base_layer()

    @cached_property
    def _weights(self) -> list[tuple[nn.Parameter, Tensor, Tensor]]:
        """Each linear weight as it is and with the LoRA added; empty where that is too large."""
        layers = [layer for layer in self._layers if isinstance(layer, LoraLinear)]
        weights = [_weight(layer) for layer in layers]
        size = sum(weight.numel() * weight.element_size() for weight in weights)
        # Weights that wait on disk until they are needed cannot be exchanged.
        if size > MERGED_BYTES or not self.is_linear:
            return []
        with torch.no_grad():
            return [
                (weight, weight.data, (weight + _added(layer)).to(weight.dtype))
                for layer, weight in zip(layers, weights, strict=True)
            ]

    @contextmanager
    def on(self, *, briefly: bool = False) -> Iterator[None]:
        """Make the model the expert; at the end, also after an exception, the base again.

        Args:
            briefly: For a pass or two: without the merged weights, which are kept once made.
        """
        weights = [] if briefly else self._weights
        self._set(weights, on=True)
        try:
            yield
        finally:
            self._set(weights, on=False)

    @cached_property
    def is_linear(self) -> bool:
        """All its layers stand beside linear layers whose weights are at hand."""
        layers = [layer for layer in self._layers if isinstance(layer, LoraLinear)]
        whole = all(not _weight(layer).is_meta for layer in layers)
        return len(layers) == len(self._layers) and whole

    @cached_property
    def _second_rows(self) -> list[tuple[LoraLinear, SecondRow]]:
        """Each layer with what stands in its place while the LoRA is the second row's."""
        layers = [layer for layer in self._layers if isinstance(layer, LoraLinear)]
        return [(layer, _second_row(layer)) for layer in layers]

    def merged_copy(self, model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
        """A copy of the model with the LoRA added to its weights.

        Args:
            model: The model that the layers are inside of; all of them stand beside linear layers.
            dtype: Of the copy's weights.
        """
        memo: dict[int, object] = {}
        for parameter in model.parameters():
            memo[id(parameter)] = _frozen(parameter, dtype)
        layers = {n: m for n, m in model.named_modules() if isinstance(m, LoraLinear)}
        for layer in layers.values():
            weight = _weight(layer)
            with torch.no_grad():
                memo[id(weight)] = _frozen(weight + _added(layer), dtype)
        copy = deepcopy(model, memo)
        for name in layers:
            parent, _, own = name.rpartition(".")
            copied: Any = copy.get_submodule(name)
            setattr(copy.get_submodule(parent), own, copied.get_base_layer())
        for module in copy.modules():
            # A way to compute that suits the weights as they were.
            vars(module).pop("forward", None)
        return copy

    @contextmanager
    def on_second(self) -> Iterator[None]:
        """Add the LoRA to the second of a batch's two rows, so that it serves base and expert."""
        try:
            for layer, second in self._second_rows:
                vars(layer)["forward"] = second
            yield
        finally:
            self._step_aside()

    def _set(self, weights: Sequence[tuple[nn.Parameter, Tensor, Tensor]], *, on: bool) -> None:
        for weight, base, merged in weights:
            weight.data = merged if on else base
        if weights:
            return
        # enable_adapters also walks all weights to set requires_grad, which would cost as much as
        # a small model's step, twice a generated token.
        for layer in self._layers:
            layer._disable_adapters = not on  # pyright: ignore[reportPrivateUsage]
            if on:
                vars(layer).pop("forward", None)
        if not on:
            self._step_aside()


def _frozen(weight: Tensor, dtype: torch.dtype) -> nn.Parameter:
    return nn.Parameter(weight.detach().to(dtype, copy=True), requires_grad=False)


def _second_row(layer: LoraLinear) -> SecondRow:
    weight, (name,) = _weight(layer), layer.lora_A
    down, up = layer.lora_A[name].weight, layer.lora_B[name].weight
    assert isinstance(down, Tensor) and isinstance(up, Tensor)
    # A processor starts a small product of float32 in a sixth of the time of one of bfloat16.
    on_cpu = weight.device.type == "cpu"
    dtype = torch.promote_types(weight.dtype, torch.float32) if on_cpu else weight.dtype
    with torch.no_grad():
        down = down.T.to(weight.device, dtype)
        up = (layer.scaling[name] * up).T.to(weight.device, dtype)
    return SecondRow(layer.get_base_layer(), down.contiguous(), up.contiguous())


def _weight(layer: LoraLinear) -> nn.Parameter:
    weight = layer.get_base_layer().weight
    assert isinstance(weight, nn.Parameter)
    return weight


def _added(layer: LoraLinear) -> Tensor:
    """What a LoRA adds to its weight."""
    (name,) = layer.lora_A
    return layer.get_delta_weight(name)


def attach_lora(model: PreTrainedModel, folder: Path) -> LoraSwitch:
    """Put an expert's LoRA into its base model, switched off.

    The base's own weights stay; only its linear layers get a second path beside them.

    Args:
        model: The base; changed in place.
        folder: PEFT folder with adapter_config.json and adapter_model.safetensors.

    Raises:
        AdapterError: A missing or broken file, an unsupported setting, weights that do not fit
            the model, or a LoRA on the model's embeddings or head.
    """
    config = read_lora_config(folder)
    found = weight_names(folder / WEIGHTS_NAME)
    try:
        # PEFT warns of missing weights, which the comparison below turns into an error.
        with warnings.catch_warnings(action="ignore"):
            # By itself it would read them onto a GPU wherever there is one, whatever the model's
            # own place, to which they are copied from here.
            wrapped = PeftModel.from_pretrained(
                model, str(folder), config=config, torch_device="cpu"
            )
    except (RuntimeError, ValueError, TypeError, KeyError, SafetensorError) as error:
        raise AdapterError(
            f"the LoRA in {folder} does not fit the model: {error}",
            hint="use the base model that expert.json or the adapter's manifest names",
        ) from error
    _refuse_head(model, folder)
    expected = set(get_peft_model_state_dict(wrapped, save_embedding_layers=False))
    if found != expected:
        raise AdapterError(
            f"the LoRA in {folder} lacks {len(expected - found)} weights of this model and has "
            f"{len(found - expected)} others",
            hint="use the base model that expert.json or the adapter's manifest names",
        )
    return LoraSwitch(model)


def weight_names(path: Path) -> set[str]:
    """Names of a LoRA's weights.

    Raises:
        AdapterError: The file is missing or broken.
    """
    # Checked before PEFT looks, which would take a pickle in place of a missing file.
    try:
        with safe_open(path, framework="pt") as weights:
            return set(weights.keys())
    except (OSError, SafetensorError) as error:
        raise AdapterError(
            f"cannot read the LoRA's weights {path}: {error}", hint=FETCH_AGAIN
        ) from error


def _refuse_head(model: PreTrainedModel, folder: Path) -> None:
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    if any(isinstance(end, BaseTunerLayer) for end in ends):
        raise AdapterError(
            f"the LoRA in {folder} changes the embeddings or the head",
            hint="an expert leaves both alone; make it with `trimtab tune`",
        )
