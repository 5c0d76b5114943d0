"""Makes vLLM keep its hosts' states, in each of its processes, where the plugin has settings."""

import os

VARIABLE = "TRIMTAB_VLLM"
"""Environment variable that names the file of settings: every process of the engine can read it."""


def register() -> None:
    """Let vLLM's registry of models give out subclasses that leave their states in a stash.

    vLLM calls this, as an entry point, in each process before it opens a model. Without settings
    nothing happens. The registry's answer is replaced, not its entries: which class a host needs
    is known only there.
    """
    if not os.environ.get(VARIABLE):
        return
    from vllm import ModelRegistry  # pyright: ignore[reportMissingImports]

    from trimtab.vllm.stash import stashing

    plain = ModelRegistry.resolve_model_cls
    if getattr(plain, "is_trimtabs", False):
        return

    def resolve_model_cls(*args: object, **options: object) -> tuple[type, str]:
        found, name = plain(*args, **options)
        return stashing(found), name

    resolve_model_cls.is_trimtabs = True  # pyright: ignore[reportFunctionMemberAccess]
    ModelRegistry.resolve_model_cls = resolve_model_cls
