"""Base of all configurations, and what several of them name."""

from typing import Literal

from pydantic import BaseModel, ConfigDict

Dtype = Literal["auto", "float32", "bfloat16"]
CarrierName = Literal["head", "memory", "expert"]

MIN_WINDOW_TOKENS = 8
"""Of a training window."""


class Config(BaseModel):
    """Base of all verbs' configurations: frozen, no unknown keys, documented fields."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", validate_default=True, use_attribute_docstrings=True
    )
