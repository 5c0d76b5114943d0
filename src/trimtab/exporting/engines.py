"""What the engines refuse, said before anything is written, with what to use instead."""

from collections.abc import Sequence

from trimtab.backends.hf import HFModel
from trimtab.config import ExportKind
from trimtab.errors import ModelError
from trimtab.exporting.linear import LORA_RANKS
from trimtab.store.card import readable_bytes

VLLM = "vLLM 0.32"
"""The version whose source and behaviour all of this was told from; it differs with versions."""

VLLM_MAX_VOCABULARY = 258_048
"""Rows of a head that vLLM takes a LoRA for (vllm/lora/layers/logits_processor.py)."""

VLLM_WITH_HEAD = frozenset(
    "apertus ernie4_5 exaone4 exaone_moe falcon_h1 granite granite_swa granitemoe granitemoe_swa"
    " granitemoehybrid granitemoeshared hyperclovax inkling_text jamba lfm2 lfm2_moe llama minicpm3"
    " mixtral nemotron nemotron_h phi3 phimoe qwen3 qwen3_5_moe_text qwen3_5_text qwen3_moe".split()
)
"""Families whose class there names the head among what a LoRA may change (`embedding_modules`).
Of all others a LoRA on the head is refused as it is loaded: Qwen 2.5, Mistral, Gemma, Cohere, and
those that have no class of their own. Llama 4's class names it, but the one around it, for text and
images, which its checkpoints ask for, overlooks a LoRA on it without a word."""

VLLM_WITHOUT_HEAD = frozenset(["cohere", "cohere2", "cohere2_moe"])
"""Families whose class there takes logits from the embedding, whatever head a checkpoint has; of
those that cap their logits, such as Gemma 2, `check_host` refuses a merged one."""

_INSTEAD = "serve a --to merged export there, or `trimtab serve --engine vllm`"


def is_gemma(host: HFModel) -> bool:
    """Whether a host is of the family whose head llama.cpp's converter drops."""
    return _family(host).startswith("gemma")


def is_cohere(host: HFModel) -> bool:
    """Whether a host is of a family whose own head vLLM drops, and llama.cpp's converter too."""
    return _family(host) in VLLM_WITHOUT_HEAD


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
    """Why vLLM takes no LoRA on this host's head, in plain words; empty where it takes one.

    Args:
        host: The host.
        rank: Rank of the LoRA with its padding.
    """
    if host.is_encoder_decoder:
        return [f"{VLLM} serves no encoder-decoder of text such as {host.ref}: load it with peft"]
    rows, family = len(host.unembedding.weight), _family(host)
    found = []
    if family not in VLLM_WITH_HEAD:
        found.append(f"{VLLM} takes no LoRA on the head of {family} models")
    if rows > VLLM_MAX_VOCABULARY:
        found.append(
            f"{VLLM} takes a LoRA on a head of at most {VLLM_MAX_VOCABULARY:,} rows, and {host.ref}"
            f" has {rows:,}"
        )
    if rank > LORA_RANKS[-1]:
        found.append(f"{VLLM} takes ranks up to {LORA_RANKS[-1]}, and this one is {rank}")
    instead = "use `trimtab serve --engine vllm` there" if is_cohere(host) else _INSTEAD
    return [f"{reason}: {instead}" for reason in found]


def merged_notes(host: HFModel, *, was_tied: bool) -> Sequence[str]:
    """What a checkpoint with a head of its own needs of an engine, in plain words.

    Args:
        host: The host.
        was_tied: Its head was its embedding.
    """
    found = []
    if is_cohere(host):
        found.append(
            f"transformers reads the head of this checkpoint; {VLLM} drops it without a word and"
            " serves the bare host, as it takes the head of Cohere's models from the embedding, and"
            " so does llama.cpp: use `trimtab serve --engine vllm`, or transformers"
        )
    if not was_tied:
        return found
    size = host.unembedding.weight.nbytes
    found.append(
        f"{host.ref} shares its head with its embedding; this checkpoint has both"
        f" (tie_word_embeddings is false) and is larger by {readable_bytes(size)}"
    )
    if is_gemma(host):
        found.append(
            "llama.cpp's converter drops this head of Gemma: for llama.cpp use --to gguf of a GGUF"
            " host"
        )
    return found
