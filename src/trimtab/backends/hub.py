"""Models from a hub: their safetensors, configuration and tokenizer, and nothing else."""

import os
from pathlib import Path

from huggingface_hub import HfApi, constants, hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from trimtab.errors import ModelError, TrimtabError, first_line
from trimtab.store.storage_errors import storage_errors
from trimtab.types import Progress

CONNECT_SEC = 8.0
_PATTERNS = (".json", ".safetensors", ".model", ".txt", ".jinja", ".spm")
_ELSEWHERE = "give a local folder, a GGUF file, or tiny:llama"


def download_model(ref: str, progress: Progress) -> Path:
    """Fetch a model from the hub, or find it in the hub's cache when the hub is unreachable.

    Args:
        ref: Hub name, with @revision to pin a version.
        progress: Shows the download, in bytes.

    Returns:
        The snapshot's folder in the hub's own cache.

    Raises:
        ModelError: There is no such model, it is gated, or the hub cannot be reached.
        StorageError: The disk is full.
    """
    name, revision = name_and_revision(ref)
    try:
        with storage_errors(Path(constants.HF_HUB_CACHE)):
            return _download(name, revision, progress)
    except (RepositoryNotFoundError, RevisionNotFoundError, HFValidationError) as error:
        raise _unknown(ref, error) from error
    except TrimtabError:
        raise
    except Exception as error:
        # The client lets its transport's errors through, whose library changes between versions.
        return _cached(ref, name, revision, error)


def name_and_revision(ref: str) -> tuple[str, str | None]:
    """A hub name, and the version that is pinned behind an @, if any."""
    name, _, revision = ref.partition("@")
    return name, revision or None


def revision_of(folder: Path) -> str | None:
    """The commit whose files a folder holds, if it lies in the hub's cache."""
    return folder.name if folder.parent.name == "snapshots" else None


def _download(name: str, revision: str | None, progress: Progress) -> Path:
    # Read here, not at import: a user may set the address of a mirror for one call.
    endpoint = os.environ.get("HF_ENDPOINT") or None
    info = HfApi(endpoint=endpoint).model_info(
        name, revision=revision, timeout=CONNECT_SEC, files_metadata=True
    )
    wanted = _wanted({file.rfilename: file.size or 0 for file in info.siblings or ()})
    folder: Path | None = None
    with progress(f"downloading {name} (bytes)", sum(wanted.values())) as advance:
        for filename, size in wanted.items():
            local = hf_hub_download(
                name, filename, revision=info.sha, endpoint=endpoint, etag_timeout=CONNECT_SEC
            )
            folder = Path(local).parents[filename.count("/")]
            advance(size)
    if folder is None:
        raise ModelError(f"{name} has no files that can be read", hint=_ELSEWHERE)
    return folder


def _wanted(sizes: dict[str, int]) -> dict[str, int]:
    """Choose the files of transformers' layout: top-level, and not the publisher's own shards."""
    top = {name: size for name, size in sizes.items() if "/" not in name}
    chosen = {name: size for name, size in top.items() if name.endswith(_PATTERNS)}
    return {name: size for name, size in chosen.items() if not name.startswith("consolidated")}


def _cached(ref: str, name: str, revision: str | None, cause: Exception) -> Path:
    try:
        return Path(snapshot_download(name, revision=revision, local_files_only=True))
    except (LocalEntryNotFoundError, OSError, ValueError):
        raise _unreachable(ref, cause) from cause


def _unknown(ref: str, error: Exception) -> ModelError:
    if isinstance(error, GatedRepoError):
        return ModelError(
            f"{ref} asks for its licence to be accepted",
            hint=f"accept it on the hub and log in with `hf auth login`, or {_ELSEWHERE}",
        )
    return ModelError(
        f"there is no model {ref}: no such folder here, and none on the hub",
        hint=f"check the name, log in if it is private, or {_ELSEWHERE}",
    )


def _unreachable(ref: str, error: Exception) -> ModelError:
    reason = first_line(error)
    return ModelError(
        f"{ref} is not a folder here, and the hub cannot be reached: {reason}",
        hint=f"check the network, or {_ELSEWHERE}",
    )
