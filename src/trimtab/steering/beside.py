"""The expert and its reference, opened to run beside a host."""

from pathlib import Path

from trimtab.backends.hf import ModelFingerprint
from trimtab.backends.pair import Pair, open_pair_from
from trimtab.config import Dtype
from trimtab.errors import ModelError
from trimtab.store.adapter import EXPERT_FOLDER
from trimtab.store.adapter_schema import AdapterManifest
from trimtab.types import Progress, silent


def open_beside(
    manifest: AdapterManifest,
    folder: Path,
    *,
    small: str | None = None,
    dtype: Dtype = "auto",
    progress: Progress = silent,
) -> Pair:
    """Open an adapter's small model with the expert's LoRA.

    Args:
        manifest: Of the adapter.
        folder: Of the adapter.
        small: Where the small model lies; None where the adapter says. Its fingerprint decides.
        dtype: Arithmetic.
        progress: Shows the opening.

    Raises:
        ModelError: The small model cannot be opened, or is not the one that was tuned.
        AdapterError: The adapter's LoRA is broken.
    """
    base = manifest.base_model
    fingerprint = ModelFingerprint(base.vocabulary_sha256, base.unembedding_sha256)
    try:
        return open_pair_from(
            small or base.ref,
            folder / EXPERT_FOLDER,
            fingerprint=fingerprint,
            dtype=dtype,
            progress=progress,
        )
    except ModelError as error:
        if small:
            raise
        raise ModelError(
            f"the expert of {manifest.name} needs the small model {base.ref}, and {error.message}",
            hint="name the place where it lies with --small; head and memory work without it",
        ) from error
