"""What the engines refuse, said before anything is written, with what to use instead."""

from collections.abc import Sequence

from trimtab.backends.hf import HFModel
from trimtab.config import ExportKind
from trimtab.errors import ModelError
from trimtab.exporting.linear import LORA_RANKS
from trimtab.store.card import readable_bytes

VLLM_MAX_VOCABULARY = 258_048
"""Rows of a head that vLLM 0.33 takes a LoRA for (vllm/lora/layers/logits_processor.py)."""

_VLLM_WITH_HEAD = ("llama", "qwen3", "qwen3_moe")
"""Families whose vLLM class is known to take a LoRA on the head; its Mistral and Gemma classes and
that of GPT-2 do not, since the head is not among their embedding modules."""

_GEMMA = (
    "vLLM takes no LoRA on the head of Gemma (its classes offer none, and a head of more than"
    f" {VLLM_MAX_VOCABULARY:,} rows is refused; {{ref}} has {{rows:,}}), and refuses a merged,"
    " untied one: serve it with peft in transformers, or --to gguf of a GGUF host in llama.cpp"
)


def is_gemma(host: HFModel) -> bool:
    """Whether a host is of the family whose head neither vLLM nor llama.cpp's converter changes."""
    return _family(host).startswith("gemma")


def _family(host: HFModel) -> str:
    return host.model.config.get_text_config(decoder=True).model_type


def check_host(host: HFModel, kind: ExportKind) -> None:
    """Refuse a host that the export cannot be exact or useful for.

    Args:
        host: The host.
        kind: The export.

    Raises:
        ModelError: Logits are capped after the head, the model is an encoder-decoder where the
            engine reads decoders only, or its head is quantised.
    """
    cap = host.unembedding.softcap
    if cap is not None and kind != "onnx":
        raise ModelError(
            f"{host.ref} caps its logits at {cap:g} after its head, and the adapter's shift comes"
            f" after the cap: weights of the head, as --to {kind} writes them, come before it",
            hint="use --to onnx, which takes the capped logits, or `trimtab generate`",
        )
    if host.is_encoder_decoder and kind in ("gguf", "merged"):
        raise ModelError(
            f"{host.ref} is an encoder-decoder, which --to {kind} does not write",
            hint="use --to peft or --to onnx",
        )
    if kind == "merged" and not host.unembedding.weight.is_floating_point():
        raise ModelError(
            f"the head of {host.ref} is quantised to {host.unembedding.weight.dtype}",
            hint="give the host as it was before its quantisation, or use --to peft",
        )


def vllm_notes(host: HFModel, rank: int) -> Sequence[str]:
    """Why vLLM will refuse a LoRA on this host's head, in plain words; empty if nothing is known.

    Args:
        host: The host.
        rank: Rank of the LoRA with its padding.
    """
    rows = len(host.unembedding.weight)
    instead = "serve a --to merged export there"
    if is_gemma(host):
        return [_GEMMA.format(rows=rows, ref=host.ref)]
    found = []
    if rows > VLLM_MAX_VOCABULARY:
        found.append(
            f"vLLM takes a LoRA on a head of at most {VLLM_MAX_VOCABULARY:,} rows, and {host.ref}"
            f" has {rows:,}: {instead}"
        )
    family = _family(host)
    if family not in _VLLM_WITH_HEAD:
        found.append(
            "vLLM takes a LoRA on the head of Llama and Qwen3 models; of the family"
            f" {family} that is not known: if it refuses, {instead}"
        )
    if rank > LORA_RANKS[-1]:
        found.append(f"vLLM takes ranks up to {LORA_RANKS[-1]}, and this one is {rank}: {instead}")
    return found


def merged_notes(host: HFModel, *, was_tied: bool) -> Sequence[str]:
    """What a checkpoint with a head of its own needs of an engine, in plain words.

    Args:
        host: The host.
        was_tied: Its head was its embedding.
    """
    if not was_tied:
        return ()
    size = host.unembedding.weight.nbytes
    found = [
        f"{host.ref} shares its head with its embedding; this checkpoint has both"
        f" (tie_word_embeddings is false) and is larger by {readable_bytes(size)}"
    ]
    if is_gemma(host):
        found.append(
            "transformers reads it; vLLM's Gemma classes insist on a shared head and refuse it, and"
            " llama.cpp's converter drops the head: for llama.cpp use --to gguf of a GGUF host"
        )
    return found
