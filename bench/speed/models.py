"""The open models of one pair, each opened when it is first asked for."""

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any, final

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import PreTrainedModel

from bench.speed.lockstep import ProxyModels
from bench.speed.material import Material
from bench.speed.shapes import SCHEME, random_host
from trimtab import MountConfig
from trimtab.backends.hf import HFModel
from trimtab.backends.live import Live
from trimtab.backends.open import one_device, open_model
from trimtab.backends.pair import Pair, open_pair
from trimtab.mount import mount
from trimtab.steering.mounted import Mounted

LORA_RANK = 16
"""Of the LoRA on the host: what `tune` takes unless told otherwise."""


@final
class Models:
    """Models of a pair; those that have the same weights share them."""

    def __init__(self, material: Material) -> None:
        """Open nothing yet."""
        self.material = material

    @property
    def _progress(self) -> Any:
        return self.material.display.progress

    @cached_property
    def host(self) -> HFModel:
        """The bare host."""
        pair = self.material.pair
        if pair.is_random:
            assert pair.tokenizer is not None
            return random_host(pair.host.removeprefix(SCHEME), pair.tokenizer)
        return open_model(self.material.host_ref, progress=self._progress)

    @cached_property
    def small(self) -> HFModel:
        """The small model before tuning, without anything in it."""
        return open_model(self.material.small_ref, device_map=one_device(), progress=self._progress)

    @cached_property
    def pair(self) -> Pair:
        """Expert and reference as Trimtab runs them."""
        return open_pair(self.material.expert, progress=self._progress)

    @cached_property
    def live(self) -> Live:
        """The pair beside the host."""
        return Live(self.pair, self.host)

    @cached_property
    def proxy(self) -> ProxyModels:
        """Three models of their own."""
        place = one_device()
        base = open_model(self.material.small_ref, device_map=place, progress=self._progress).model
        with _without_warnings():
            tuned = PeftModel.from_pretrained(base, str(self.material.expert / "lora"))
            merged: Any = tuned.merge_and_unload()
        return ProxyModels(self.host.model, merged.eval(), self.small.model)

    @cached_property
    def lora_host(self) -> PreTrainedModel:
        """The host with a LoRA beside its linear layers, as a server of several LoRAs runs it."""
        return with_lora(self.host.model)

    @cached_property
    def mounted(self) -> Mounted:
        """The adapter on the host."""
        return self._mounted(self.material.adapter)

    @cached_property
    def mounted_large(self) -> Mounted:
        """The adapter with the large memory on the host."""
        return self._mounted(self.material.large_adapter(self.small))

    def _mounted(self, adapter: Any) -> Mounted:
        config = MountConfig(adapter=adapter, host=self.material.host_ref)
        return mount(config, host=self.host, progress=self._progress)

    def close(self) -> None:
        """Let go of all that is open; what is asked for again is opened again."""
        for name in list(vars(self)):
            if name != "material":
                del vars(self)[name]


@contextmanager
def _without_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        # PEFT asks transformers for a property that transformers is about to rename.
        warnings.simplefilter("ignore", FutureWarning)
        yield


def with_lora(model: PreTrainedModel) -> PreTrainedModel:
    """A second model with the same weights, and a LoRA beside its linear layers.

    The LoRA's weights are random, and small: how long it takes does not depend on them.
    """
    copied: Any = shared_copy(model)
    settings = LoraConfig(r=LORA_RANK, target_modules="all-linear", task_type="CAUSAL_LM")
    with _without_warnings():
        # Else a bfloat16 model's LoRA is in float32, and each of its products a conversion slower.
        wrapped = get_peft_model(copied, settings, autocast_adapter_dtype=False)
    with torch.no_grad():
        for name, weight in wrapped.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=1e-4)
    return copied.eval()


def shared_copy(model: PreTrainedModel) -> PreTrainedModel:
    """A second model with the same weights, in which modules can be replaced."""
    tensors: list[nn.Parameter | torch.Tensor] = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})
