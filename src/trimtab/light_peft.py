"""What is used of PEFT, which is imported without bitsandbytes.

PEFT imports it wherever it is installed, for a measure that is not used here, and it compiles
functions while it is imported: that takes longer than PEFT itself, in every command. Layers of four
bits import it when they are made (`tuning/four_bit.py`).
"""

# What hides a package has to stand before the imports.
# ruff: noqa: E402

import importlib
import sys

_HEAVY = "bitsandbytes"

if "peft" not in sys.modules and _HEAVY not in sys.modules:
    # None makes an import fail as that of a package that is not installed.
    sys.modules[_HEAVY] = None  # type: ignore[assignment]
    try:
        importlib.import_module("peft")
    finally:
        del sys.modules[_HEAVY]

from peft import (
    LoraConfig,
    LoraModel,
    PeftModel,
    TaskType,
    get_peft_model,
    get_peft_model_state_dict,
)
from peft.helpers import disable_input_dtype_casting
from peft.tuners.lora.layer import Linear as LoraLinear
from peft.tuners.tuners_utils import BaseTunerLayer

__all__ = [
    "BaseTunerLayer",
    "LoraConfig",
    "LoraLinear",
    "LoraModel",
    "PeftModel",
    "TaskType",
    "disable_input_dtype_casting",
    "get_peft_model",
    "get_peft_model_state_dict",
]
