"""Tune a small model once, carry its expertise as an adapter, steer any larger model with it.

Names load on first use, so that importing the package does not load torch. A verb is a function
and a module of one name: `trimtab.tune` and `from trimtab import tune` are always the function,
while `from trimtab.tune import TuneResult` reaches the module.
"""

import logging
import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from trimtab.append import append as append
    from trimtab.backends.open import open_model as open_model
    from trimtab.compare import compare as compare
    from trimtab.config import AppendConfig as AppendConfig
    from trimtab.config import CompareConfig as CompareConfig
    from trimtab.config import CostConfig as CostConfig
    from trimtab.config import EvaluateConfig as EvaluateConfig
    from trimtab.config import ExportConfig as ExportConfig
    from trimtab.config import FitConfig as FitConfig
    from trimtab.config import GenerateConfig as GenerateConfig
    from trimtab.config import MountConfig as MountConfig
    from trimtab.config import ProbeConfig as ProbeConfig
    from trimtab.config import RecordConfig as RecordConfig
    from trimtab.config import ServeConfig as ServeConfig
    from trimtab.config import TuneConfig as TuneConfig
    from trimtab.cost import cost as cost
    from trimtab.errors import TrimtabError as TrimtabError
    from trimtab.evaluate import evaluate as evaluate
    from trimtab.export import export as export
    from trimtab.fit import fit as fit
    from trimtab.generate import generate as generate
    from trimtab.generate import steered as steered
    from trimtab.mount import mount as mount
    from trimtab.probe import probe as probe
    from trimtab.progress import Display as Display
    from trimtab.record import record as record
    from trimtab.serve import serve as serve
    from trimtab.show import show as show
    from trimtab.store.local import list_adapters as list_adapters
    from trimtab.tune import tune as tune

# bitsandbytes warns of a kernel that nobody needs.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

_VERBS = (
    *("tune", "record", "fit", "append", "mount", "export", "generate", "evaluate"),
    *("cost", "serve", "compare", "probe"),
    "show",
)
_MODULES = {
    **{verb: f"trimtab.{verb}" for verb in _VERBS},
    **{f"{verb.title()}Config": "trimtab.config" for verb in _VERBS[:-1]},
    "Display": "trimtab.progress",
    "TrimtabError": "trimtab.errors",
    "list_adapters": "trimtab.store.local",
    "open_model": "trimtab.backends.open",
    "steered": "trimtab.generate",
}
__all__ = sorted(_MODULES)  # pyright: ignore[reportUnsupportedDunderAll]


class _Package(ModuleType):
    """Keeps a verb's name for its function.

    The import system binds a submodule to its package under the submodule's name, which would
    otherwise turn `trimtab.tune` from the function into the module, depending on import order.
    """

    def __setattr__(self, name: str, value: object) -> None:
        """Bind the function of a verb instead of its module."""
        if name in _VERBS and isinstance(value, ModuleType):
            value = getattr(value, name)
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def __getattr__(name: str) -> object:
    """Load a public name on first use."""
    if name not in _MODULES:
        raise AttributeError(f"module 'trimtab' has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    """Public names."""
    return list(__all__)
