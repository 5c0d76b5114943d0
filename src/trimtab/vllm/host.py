"""The adapters of the plugin, mounted on the host that vLLM is about to load. Needs no vLLM."""

import logging

import torch

from trimtab.backends.open import open_head, open_model
from trimtab.config import ServeConfig
from trimtab.serving.adapters import Adapters
from trimtab.steering.several import Several
from trimtab.vllm.settings import Asked, Settings

_LOG = logging.getLogger("vllm.trimtab")
_NAME = "host"


def seated(settings: Settings, ref: str) -> Adapters:
    """Mount all adapters.

    A seat that is kept (`trimtab mount` keeps it) needs the host's head and tokenizer alone.
    Otherwise the whole host is opened once, on the CPU, for the pass over the probe text.

    Args:
        settings: What steers.
        ref: The host as vLLM has it, for settings that name no other.

    Raises:
        AdapterError: An adapter is broken or does not fit the host.
        ModelError: The host cannot be opened.
    """
    config, ref = settings.config, settings.config.host or ref
    given = config.model_dump(include={"adapter", "carriers", "host_keys", "dtype"})
    served = ServeConfig.model_validate({"host": ref, "name": _NAME, **given})
    head = open_head(ref, dtype=config.dtype)
    adapters = Adapters(served, head)
    folders = settings.folders
    missing = [name for name, folder in folders.items() if not adapters.is_seated(name, folder)]
    if missing:
        _LOG.info("mounting %s on %s: a pass over the probe text", ", ".join(missing), ref)
        # In the arithmetic that names the seats, but beside the device that vLLM takes.
        arithmetic = "bfloat16" if head.model.dtype is torch.bfloat16 else "float32"
        whole = Adapters(served, open_model(ref, dtype=arithmetic, device_map="cpu"))
        for name in missing:
            whole.load(name, folders[name])
        # Their seats are kept now, and the whole host is let go of.
        del whole
    for name, folder in folders.items():
        _LOG.info("%s", adapters.load(name, folder).mounted.summary())
    return adapters


def mixture(adapters: Adapters, asked: Asked) -> Several | None:
    """What steers a request; None where all strengths are 0.

    Args:
        adapters: The adapters.
        asked: What `Settings.asked` has found to be there.
    """
    chosen = adapters.chosen(f"{_NAME}+{asked.adapters}", asked.carriers, None)
    return adapters.mixture(chosen) if chosen else None
