"""Open any model by what the user calls it."""

import os
import re
import warnings
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from trimtab.backends.attention import share_keys
from trimtab.backends.gguf import converted_folder
from trimtab.backends.heads import load_head, read_unembedding
from trimtab.backends.hf import HFModel, adopt_model, quiet_transformers
from trimtab.backends.hub import download_model, revision_of
from trimtab.backends.tiny import TINY_SCHEME, parse_tiny, tiny_model, tiny_tokenizer
from trimtab.backends.tokenizers import read_vocabulary
from trimtab.config import Dtype, EvaluateConfig, GenerateConfig, MountConfig, is_hosted
from trimtab.errors import ModelError, first_line
from trimtab.few_rows import hasten
from trimtab.types import Progress, silent

LLAMACPP_SCHEME = "llamacpp:"
"""What the name of a host begins with that runs in llama.cpp; its GGUF file follows."""

_SPREAD = ("auto", "balanced", "balanced_low_0", "sequential")
"""Ways in which accelerate spreads a model over several devices."""

_HINT = "give a hub name, a local folder, a GGUF file, or tiny:llama"

_ADDRESS = re.compile(r"[a-z]+://.*|[\w.-]+:\d+(/.*)?")
"""Of a server; no model is called so."""


def open_model(
    ref: str,
    *,
    dtype: Dtype = "auto",
    device_map: str | None = None,
    engines: bool = False,
    progress: Progress = silent,
) -> HFModel:
    """Open a model: hub name[@revision], local folder, GGUF file, or tiny:NAME.

    A GGUF file is unpacked once into a cache (`TRIMTAB_HOME`, default ~/.cache/trimtab), which
    can take a minute. No code that a model brings is ever run, and only safetensors are read.
    As llamacpp:FILE a GGUF file is a host that stays quantised and runs in llama.cpp.

    Args:
        ref: What the user calls the model.
        dtype: Arithmetic; auto takes bfloat16 where the processor has it in hardware.
        device_map: Where the model goes: cpu, cuda, cuda:1, or auto, which spreads it over all
            accelerators; None as in `placed`.
        engines: Take a host that runs outside torch, whose weights cannot be changed or moved.
        progress: Shows downloads and the unpacking of a GGUF file.

    Raises:
        ModelError: The model cannot be found, reached, read or understood, or runs outside torch
            where its weights are needed.
    """
    with quiet_transformers():
        if is_in_llamacpp(ref):
            _check_engine(ref, engines, device_map)
            # Imported here: what it needs is in an extra.
            from trimtab.backends.llamacpp.opening import open_llamacpp

            exact = dtype == "float32"
            arithmetic = resolve_dtype(dtype, "cpu")
            return open_llamacpp(ref, arithmetic, in_float32=exact, progress=progress)
        place = placed(device_map)
        _check_device(place)
        arithmetic = resolve_dtype(dtype, place)
        if ref.startswith(TINY_SCHEME):
            spec = parse_tiny(ref)
            model = tiny_model(spec, arithmetic)
            # A toy fits on one device, however large models would be spread.
            one = one_device() if place in _SPREAD else place
            model.to(one)  # pyright: ignore[reportArgumentType]
            _hasten(model)
            return replace(adopt_model(ref, model, tiny_tokenizer(spec)), source=ref)
        folder = _folder(ref, progress)
        source = _source(folder)
        with progress(f"opening {ref}", 0):
            model = _load_model(ref, folder, arithmetic, place)
            _hasten(model)
            opened = adopt_model(ref, model, load_tokenizer(ref, folder))
        return replace(opened, source=source, revision=revision_of(folder))


def _hasten(model: PreTrainedModel) -> None:
    hasten(model)
    share_keys(model)


def is_in_llamacpp(ref: str) -> bool:
    """Whether a model's name asks for it in llama.cpp."""
    return ref.startswith(LLAMACPP_SCHEME)


def _check_engine(ref: str, engines: bool, device_map: str | None) -> None:
    if not engines:
        raise ModelError(
            f"{ref} would run in llama.cpp, and its weights are needed in torch here; in llama.cpp"
            " run the hosts of mount, generate, evaluate and fit",
            hint=f"give the file itself: {ref.removeprefix(LLAMACPP_SCHEME)}",
        )
    if device_map is not None:
        raise ModelError(
            f"{ref} runs in llama.cpp, which chooses its devices itself; --device-map is for torch",
            hint="leave --device-map out",
        )


def open_host(
    config: MountConfig | GenerateConfig | EvaluateConfig, progress: Progress = silent
) -> HFModel:
    """Open the host that a verb's configuration names, in any engine; errors as `open_model`."""
    return open_model(
        config.host,
        dtype=config.dtype,
        device_map=config.device_map,
        engines=True,
        progress=progress,
    )


def check_in_torch(model: HFModel, purpose: str) -> None:
    """Refuse a model whose weights are in an engine of its own.

    Args:
        model: Any model.
        purpose: What needs the weights, as a verb: `trimtab export`.

    Raises:
        ModelError: They are not in torch.
    """
    if model.has_own_logits:
        raise ModelError(
            f"{model.ref} runs in an engine of its own, and {purpose} needs its weights in torch",
            hint=f"give the file itself: {model.ref.partition(':')[2]}",
        )


def open_head(ref: str, *, dtype: Dtype = "auto", progress: Progress = silent) -> HFModel:
    """Open a host's head and tokenizer alone, on a body without weights, which cannot be run.

    That is all that an adapter whose seat is kept needs, where another engine runs the host.

    Args:
        ref: Hub name[@revision], local folder or GGUF file.
        dtype: Arithmetic; it names the seat that is looked for.
        progress: Shows downloads.

    Raises:
        ModelError: The model cannot be found, reached, read or understood.
    """
    arithmetic = resolve_dtype(dtype)
    with quiet_transformers():
        folder = _folder(ref, progress)
        _check_files(ref, folder)
        options: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
        try:
            config = AutoConfig.from_pretrained(folder, **options)
            with torch.device("meta"):
                model = AutoModelForCausalLM.from_config(config, dtype=arithmetic)
            load_head(model, folder, arithmetic)
        except Exception as error:
            # Files of the wild fail in many ways.
            raise ModelError(f"{ref} cannot be opened: {first_line(error)}", hint=_HINT) from error
        tokenizer = load_tokenizer(ref, folder)
        unembedding = read_unembedding(model)
        vocabulary = read_vocabulary(tokenizer, len(unembedding.weight))
        source = _source(folder)
        return HFModel(ref, model, tokenizer, vocabulary, unembedding, source=source)


def open_tokenizer(ref: str, progress: Progress = silent) -> PreTrainedTokenizerBase:
    """Open a model's tokenizer alone; names and errors as for `open_model`."""
    if ref.startswith(TINY_SCHEME):
        return tiny_tokenizer(parse_tiny(ref))
    return load_tokenizer(ref, _folder(ref, progress))


def placed(device_map: str | None) -> str:
    """Where a host goes: where it is asked to, or all accelerators that are there, or the CPU."""
    if device_map is not None:
        return device_map
    return "auto" if torch.cuda.is_available() else "cpu"


def one_device() -> str:
    """Where a small model goes, and one that is trained: the first accelerator, or the CPU."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def resolve_dtype(dtype: Dtype, device_map: str | None = None) -> torch.dtype:
    """Turn the configured arithmetic into torch's; auto asks the hardware.

    Args:
        dtype: The configured arithmetic.
        device_map: Where the model will be, as in `placed`.
    """
    if dtype != "auto":
        return torch.float32 if dtype == "float32" else torch.bfloat16
    if placed(device_map) != "cpu" and torch.cuda.is_available():
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    capabilities = torch.cpu.get_capabilities()
    has_bfloat16 = capabilities.get("amx_bf16") or capabilities.get("avx512_bf16")
    # A processor can be told to do with less than it has (ATEN_CPU_CAPABILITY).
    is_used = torch.backends.cpu.get_cpu_capability() == "AVX512"
    return torch.bfloat16 if has_bfloat16 and is_used else torch.float32


def load_tokenizer(ref: str, folder: Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model folder.

    Args:
        ref: Name of the model in the error.
        folder: Folder with the tokenizer's files.

    Raises:
        ModelError: There is none, or it cannot be read.
    """
    options: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    try:
        with warnings.catch_warnings():
            # Marian's tokenizer would like a package for a step that it never takes.
            warnings.filterwarnings("ignore", "Recommended: pip install sacremoses")
            return AutoTokenizer.from_pretrained(folder, **options)
    except Exception as error:
        # Tokenizer files of the wild fail in many ways, of many exception types.
        some = any(folder.glob("*token*")) or any(folder.glob("*.model"))
        reason = first_line(error) if some else "there is no tokenizer.json"
        hint = f"put the model's tokenizer.json into {folder}, or {_HINT}"
        if "sentencepiece" in str(error).lower() and find_spec("sentencepiece") is None:
            hint = "pip install 'trimtab[seq2seq]'"
        raise ModelError(f"{ref} has no tokenizer that can be read: {reason}", hint=hint) from error


def _folder(ref: str, progress: Progress) -> Path:
    if is_hosted(ref):
        raise ModelError(
            f"{ref} runs behind an API, which shows no weights, and they are needed here",
            hint="hosts behind an API are for `trimtab generate` and `trimtab hosts probe`",
        )
    if not ref:
        raise ModelError("the name of a model is empty", hint=_HINT)
    if _ADDRESS.fullmatch(ref):
        raise ModelError(
            f"{ref} is an address, and a model's name is needed here",
            hint="`trimtab hosts probe http://...` says what an API serves; generate takes it as"
            " --host openai:MODEL --api-url ADDRESS",
        )
    path = Path(ref).expanduser()
    if path.is_dir():
        return path
    if path.is_file():
        if path.suffix == ".gguf":
            return converted_folder(path, progress)
        raise ModelError(f"{ref} is a file, but not a GGUF file", hint=_HINT)
    if path.suffix == ".gguf" or ref.startswith((".", "~", os.sep)) or ref.count("/") > 1:
        raise ModelError(f"there is no file or folder {ref}", hint=_HINT)
    return download_model(ref, progress)


def _load_model(ref: str, folder: Path, dtype: torch.dtype, place: str) -> PreTrainedModel:
    _check_files(ref, folder)
    options: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    try:
        config = AutoConfig.from_pretrained(folder, **options)
        auto = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
        loaded: Any = auto.from_pretrained(
            folder,
            config=config,
            dtype=dtype,
            device_map=None if place == "cpu" else place,
            use_safetensors=True,
            output_loading_info=True,
            **options,
        )
    except Exception as error:
        # Files of the wild fail in many ways; safetensors' own error has no narrower base.
        raise ModelError(f"{ref} cannot be opened: {first_line(error)}", hint=_HINT) from error
    model, report = loaded
    if report["missing_keys"]:
        missing = sorted(report["missing_keys"])
        raise ModelError(
            f"{ref} lacks {len(missing)} of its weights, for example {missing[0]}", hint=_HINT
        )
    _check_place(ref, model)
    return model


def _check_device(place: object) -> None:
    if not isinstance(place, str) or place in _SPREAD:
        return
    try:
        torch.empty(0, device=place)
    except (RuntimeError, AssertionError) as error:
        raise ModelError(
            f"there is no device {place!r} here", hint="give cpu, cuda, cuda:1 or auto"
        ) from error


def _check_place(ref: str, model: PreTrainedModel) -> None:
    """Refuse a model that waits outside the accelerators, where no carrier can read it."""
    waiting = sum(parameter.is_meta for parameter in model.parameters())
    if waiting:
        raise ModelError(
            f"{ref} does not fit the accelerators: {waiting} of its weights would be fetched anew"
            " for every token",
            hint="run it on the processor (--device-map cpu), or as a GGUF file in llama.cpp"
            " (llamacpp:FILE.gguf)",
        )


def _source(folder: Path) -> str:
    """Names a folder's weights by their files' names, sizes and times: hashing takes minutes."""
    found = []
    for path in sorted(folder.glob("*.safetensors")):
        stat = path.stat()
        found.append(f"{path.name} {stat.st_size} {stat.st_mtime_ns}")
    return "\n".join([str(folder.resolve()), *found])


def _check_files(ref: str, folder: Path) -> None:
    if not (folder / "config.json").is_file():
        lone = next(folder.glob("*.gguf"), None)
        raise ModelError(
            f"the folder {ref} has no config.json", hint=f"open {lone}" if lone else _HINT
        )
    if not any(folder.glob("*.safetensors")):
        raise ModelError(
            f"the folder {ref} has no weights (*.safetensors; other formats are not read)",
            hint=f"save the model with save_pretrained, or {_HINT}",
        )
