"""Models saved as the folders that users have."""

from pathlib import Path

from trimtab.backends.hf import HFModel
from trimtab.backends.open import open_model


def saved(model: HFModel | str, folder: Path) -> Path:
    """Save a model, or the one that a name stands for, with its tokenizer."""
    made = open_model(model, dtype="float32") if isinstance(model, str) else model
    made.model.save_pretrained(folder)
    made.tokenizer.save_pretrained(folder)
    return folder
