"""The plugin in vLLM, whose `--logits-processors` is to be trimtab.vllm:Steering (docs/vllm.md)."""

from typing import Any


def __getattr__(name: str) -> Any:
    """Import the processor only where vLLM asks for it: not every user of vLLM steers."""
    if name != "Steering":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from trimtab.vllm import processor

    return getattr(processor, name)
