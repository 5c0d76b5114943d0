"""The expert that a recording was made of, if it still lies where it was recorded from."""

from pathlib import Path

from trimtab.errors import InputError, RecordingError
from trimtab.store.expert import EXPERT_NAME, LORA_NAME, ExpertManifest, read_expert
from trimtab.store.files import sha256_file
from trimtab.store.recording import Recording


def recorded_expert(recording: Recording) -> ExpertManifest | None:
    """What `tune` wrote of the expert; None where it is gone, or another lies in its place.

    Raises:
        InputError: expert.json cannot be read.
    """
    path = _folder(recording) / EXPERT_NAME
    if not path.is_file() or sha256_file(path) != recording.manifest.inputs["expert"]:
        return None
    return read_expert(path.parent, verify=False)


def recorded_lora(recording: Recording) -> Path:
    """The folder of the expert's LoRA, with every file of the expert checked.

    Raises:
        RecordingError: The expert is gone, or another lies in its place.
        InputError: It is no LoRA, or was changed.
    """
    folder, expert = _folder(recording), recorded_expert(recording)
    if expert is None:
        found = "another expert" if (folder / EXPERT_NAME).is_file() else "no expert"
        raise RecordingError(
            f"{folder} holds {found}, expected the one that was recorded: the expert carrier is a"
            " copy of it",
            hint="restore it there (a relative path counts from where you run this), record the"
            " expert that you mean, or leave expert out of --carriers",
        )
    if expert.method == "full":
        raise InputError(
            f"the expert in {folder} was tuned whole, and the expert carrier is a copy of a LoRA",
            hint="tune with --method lora or qlora, or leave expert out of --carriers",
        )
    read_expert(folder)
    return folder / LORA_NAME


def _folder(recording: Recording) -> Path:
    return Path(str(recording.manifest.config["expert"]))
