"""Small random models of the architectures that transformers has, one a family."""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    PreTrainedConfig,
    PreTrainedModel,
)

from trimtab.backends.tiny import parse_tiny, tiny_tokenizer

TOKENIZER = parse_tiny("tiny:llama?vocab=bpe")
"""Byte-level BPE of 512 tokens, with which every family is measured."""

ROWS = 520
"""Rows of every unembedding: some more than there are tokens, as in padded vocabularies."""

WINDOW_TOKENS = 8
"""Sliding windows are as short as this, so that short texts go beyond them."""

POSITIONS = 320
HIDDEN = 32
_BOS, _EOS, _PAD = 256, 257, 258

# A family takes those of these that its configuration has.
_SIZES: Mapping[str, Any] = {
    "vocab_size": ROWS,
    "bos_token_id": _BOS,
    "eos_token_id": _EOS,
    "pad_token_id": _PAD,
    "hidden_size": HIDDEN,
    "d_model": HIDDEN,
    "intermediate_size": 48,
    "d_ff": 48,
    "d_kv": 8,
    "num_hidden_layers": 2,
    "num_layers": 2,
    "num_decoder_layers": 2,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "ffn_dim": 48,
    "num_attention_heads": 4,
    "num_heads": 4,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": POSITIONS,
    "n_positions": POSITIONS,
    "sliding_window": WINDOW_TOKENS,
    "moe_intermediate_size": 24,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
}


@dataclass(frozen=True)
class Family:
    """A family: a configuration's model type, and what its configuration needs beside the sizes.

    Attributes:
        name: As people call it.
        model_type: As transformers calls it.
        settings: Beside or in place of the common sizes.
    """

    name: str
    model_type: str
    settings: Mapping[str, Any] = field(default_factory=dict)


_MIXED: Mapping[str, Any] = {"layer_types": ["sliding_attention", "full_attention"]}
_LATENT: Mapping[str, Any] = {
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "head_dim": 8,
    "num_key_value_heads": 4,
}
_MOE: Mapping[str, Any] = {"first_k_dense_replace": 1, "n_group": 1, "topk_group": 1}
_MAMBA2: Mapping[str, Any] = {
    "state_size": 8, "num_heads": 8, "head_dim": 8, "n_groups": 1, "chunk_size": 16,
}  # fmt: skip

FAMILIES: tuple[Family, ...] = (
    Family("Llama", "llama"),
    Family("Mistral", "mistral"),
    Family("Ministral", "ministral", _MIXED),
    Family("Mixtral", "mixtral"),
    Family("Qwen2", "qwen2", {"use_sliding_window": True, **_MIXED}),
    Family("Qwen2-MoE", "qwen2_moe", {"shared_expert_intermediate_size": 24}),
    Family("Qwen3", "qwen3", {"use_sliding_window": True, **_MIXED}),
    Family("Qwen3-MoE", "qwen3_moe"),
    Family("Qwen3-Next", "qwen3_next", {
        "layer_types": ["linear_attention", "full_attention"], "linear_num_value_heads": 4,
        "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
        "shared_expert_intermediate_size": 24,
    }),
    Family("Gemma", "gemma"),
    Family("Gemma 2", "gemma2", {**_MIXED, "final_logit_softcapping": 3.0}),
    Family("Gemma 3", "gemma3_text", _MIXED),
    Family("Gemma 3n", "gemma3n_text", {
        **_MIXED, "vocab_size_per_layer_input": ROWS, "hidden_size_per_layer_input": 8,
        "num_kv_shared_layers": 0, "laurel_rank": 4, "intermediate_size": [48, 48],
        "activation_sparsity_pattern": [0.0, 0.0], "final_logit_softcapping": 3.0,
    }),
    Family("Gemma 4", "gemma4_text", {
        **_MIXED, "vocab_size_per_layer_input": ROWS, "hidden_size_per_layer_input": 8,
        "num_kv_shared_layers": 0, "global_head_dim": 8, "final_logit_softcapping": 3.0,
    }),
    Family("Phi", "phi"),
    Family("Phi-3", "phi3"),
    Family("Phi-3.5-MoE", "phimoe"),
    Family("OLMo", "olmo"),
    Family("OLMo 2", "olmo2"),
    Family("OLMo 3", "olmo3", _MIXED),
    Family("OLMoE", "olmoe"),
    Family("GPT-2", "gpt2"),
    Family("GPT-Neo", "gpt_neo", {
        "attention_types": [[["global", "local"], 1]], "window_size": WINDOW_TOKENS,
    }),
    Family("GPT-J", "gptj", {"rotary_dim": 4}),
    Family("GPT-NeoX", "gpt_neox"),
    Family("GPTBigCode", "gpt_bigcode"),
    Family("GPT-OSS", "gpt_oss", _MIXED),
    Family("OPT", "opt", {"word_embed_proj_dim": HIDDEN}),
    Family("BLOOM", "bloom", {"n_head": 4, "n_layer": 2}),
    Family("Falcon", "falcon", {"num_kv_heads": 2, "new_decoder_architecture": True}),
    Family("Falcon (ALiBi)", "falcon", {"alibi": True, "multi_query": False}),
    Family("MPT", "mpt", {"n_heads": 4, "n_layers": 2, "max_seq_len": POSITIONS}),
    Family("CodeGen", "codegen", {"rotary_dim": 4}),
    Family("StableLM", "stablelm"),
    Family("Starcoder2", "starcoder2"),
    Family("Cohere", "cohere", {"logit_scale": 0.0625}),
    Family("Cohere 2", "cohere2", {"logit_scale": 0.25, **_MIXED}),
    Family("Granite", "granite", {"logits_scaling": 7.0}),
    Family("Granite-MoE", "granitemoe", {"logits_scaling": 7.0}),
    Family("Nemotron", "nemotron"),
    Family("GLM", "glm"),
    Family("GLM-4", "glm4"),
    Family("GLM-4-MoE", "glm4_moe", _MOE),
    Family("DeepSeek V2", "deepseek_v2", {**_LATENT, **_MOE, "topk_method": "greedy"}),
    Family("DeepSeek V3", "deepseek_v3", {**_LATENT, **_MOE}),
    Family("MiniCPM 3", "minicpm3", _LATENT),
    Family("ERNIE 4.5", "ernie4_5"),
    Family("ERNIE 4.5 MoE", "ernie4_5_moe", {"moe_num_experts": 4, "moe_k": 2}),
    Family("SmolLM3", "smollm3", {"use_sliding_window": True, **_MIXED}),
    Family("EXAONE 4", "exaone4", _MIXED),
    Family("Hunyuan", "hunyuan_v1_dense"),
    Family("Seed-OSS", "seed_oss"),
    Family("Helium", "helium"),
    Family("BitNet", "bitnet"),
    Family("Persimmon", "persimmon"),
    Family("XGLM", "xglm", {"attention_heads": 4}),
    Family("BioGPT", "biogpt"),
    Family("Llama 4", "llama4_text", {
        "attention_chunk_size": WINDOW_TOKENS, "intermediate_size_mlp": 48,
        "layer_types": ["chunked_attention", "full_attention"], "no_rope_layers": [1, 0],
    }),
    Family("MiniMax", "minimax", {
        "layer_types": ["linear_attention", "full_attention"], "block_size": 16,
    }),
    Family("LFM2", "lfm2", {"layer_types": ["conv", "full_attention"]}),
    Family("Mamba", "mamba", {"state_size": 8}),
    Family("Mamba 2", "mamba2", _MAMBA2),
    Family("Falcon-Mamba", "falcon_mamba", {"state_size": 8}),
    Family("Jamba", "jamba", {
        "attn_layer_period": 2, "attn_layer_offset": 1, "mamba_d_state": 8,
        "use_mamba_kernels": False,
    }),
    Family("Bamba", "bamba", {
        "attn_layer_indices": [1], "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8,
        "mamba_chunk_size": 16,
    }),
    Family("RecurrentGemma", "recurrent_gemma", {
        "lru_width": HIDDEN, "attention_window_size": 16,
        "block_types": ["recurrent", "attention"], "logits_soft_cap": 3.0,
    }),
    Family("RWKV", "rwkv", {"attention_hidden_size": HIDDEN, "context_length": POSITIONS}),
    Family("xLSTM", "xlstm", {"num_blocks": 2, "chunk_size": 16}),
    Family("T5", "t5"),
    Family("mT5", "mt5"),
    Family("UMT5", "umt5"),
    Family("LongT5", "longt5"),
    Family("BART", "bart", {"forced_bos_token_id": _BOS, "decoder_start_token_id": _EOS}),
    Family("mBART", "mbart"),
    Family("Marian", "marian"),
    Family("Pegasus", "pegasus"),
    Family("M2M100", "m2m_100"),
    Family("NLLB-MoE", "nllb-moe", {"expert_capacity": 64}),
    Family("Blenderbot", "blenderbot"),
    Family("PLBART", "plbart"),
    Family("Switch", "switch_transformers", {"expert_capacity": 64}),
)  # fmt: skip


def family_config(family: Family) -> PreTrainedConfig:
    """A small configuration of a family.

    Raises:
        Exception: Of any type, where the family's own code refuses the sizes.
    """
    kind = type(AutoConfig.for_model(family.model_type))
    known = set(inspect.signature(kind.__init__).parameters) | set(vars(kind()))
    known |= {new for new, old in kind.attribute_map.items() if old in known}
    known -= {old for new, old in kind.attribute_map.items() if new in _SIZES and old in _SIZES}
    sizes = {name: size for name, size in _SIZES.items() if name in known}
    if "decoder_start_token_id" not in family.settings and kind().is_encoder_decoder:
        sizes["decoder_start_token_id"] = _PAD
    return kind(**{**sizes, **family.settings})


def family_model(family: Family, *, seed: int = 0) -> PreTrainedModel:
    """A random model of a family, in float32 and in evaluation mode, the same for the same seed.

    The global random state of torch is left as it was.

    Raises:
        Exception: As `family_config`.
    """
    config = family_config(family)
    auto = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = auto.from_config(config, dtype=torch.float32)
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            # Freshly made biases are zero, which would hide one that is overlooked.
            if name.endswith(("lm_head.bias", "final_logits_bias")):
                torch.nn.init.normal_(tensor)
            elif tensor.is_floating_point() and not tensor.isfinite().all():
                torch.nn.init.normal_(tensor, std=0.02)
    return model.eval()


def family_tokenizer() -> Any:
    """The tokenizer of all families."""
    return tiny_tokenizer(TOKENIZER)
