"""Base of all configurations."""

from pydantic import BaseModel, ConfigDict


class Config(BaseModel):
    """Base of all verbs' configurations: frozen, no unknown keys, documented fields."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", validate_default=True, use_attribute_docstrings=True
    )
