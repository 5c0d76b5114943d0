"""A shipped toy family: random models small enough for tests and documentation."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from importlib.resources import files
from typing import Any, Literal, get_args
from urllib.parse import parse_qsl

import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers, processors
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    BartConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    MarianConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
    T5Config,
)

from trimtab.backends.tokenizers import BYTE_BY_LETTER
from trimtab.errors import ModelError

TINY_SCHEME = "tiny:"
TINY_FAMILIES = ("llama", "qwen3", "gemma2", "gemma3", "gpt2", "t5", "bart", "marian")
MAX_POSITIONS = 2048

_BPE_TOKENS = 512
_SPECIAL = ("<bos>", "<eos>", "<pad>")
_BOS, _EOS, _PAD = 256, 257, 258
_WANTS_BOS = ("gemma2", "gemma3")
_CHAT_TEMPLATE = (
    "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}<eos>"
    "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)

VocabName = Literal["bytes", "bpe"]


@dataclass(frozen=True)
class TinySpec:
    """What `tiny:NAME?KEY=VALUE&...` asks for.

    Attributes:
        family: One of `TINY_FAMILIES`.
        hidden: Width; a multiple of 2 * heads.
        layers: Number of layers.
        heads: Number of attention heads.
        seed: Seed of the random weights.
        vocab: `bytes` has a token for each byte, `bpe` is a byte-level BPE of 512 tokens.
        tied: 1 ties input and output embeddings, 0 does not, -1 does as the family does.
    """

    family: str
    hidden: int = 64
    layers: int = 2
    heads: int = 4
    seed: int = 0
    vocab: VocabName = "bytes"
    tied: Literal[-1, 0, 1] = -1


def parse_tiny(ref: str) -> TinySpec:
    """Read `tiny:NAME?KEY=VALUE&...`.

    Raises:
        ModelError: The family, a key or a value does not exist.
    """
    family, _, query = ref.removeprefix(TINY_SCHEME).partition("?")
    if family not in TINY_FAMILIES:
        raise ModelError(
            f"there is no toy model {family!r}; there are {', '.join(TINY_FAMILIES)}",
            hint="for example tiny:llama or tiny:gemma2?hidden=48&seed=3&vocab=bpe",
        )
    spec = TinySpec(family)
    for key, value in parse_qsl(query, keep_blank_values=True):
        spec = replace(spec, **{key: _setting(ref, key, value)})
    if min(spec.hidden, spec.layers, spec.heads) < 1 or spec.hidden % (2 * spec.heads):
        raise ModelError(
            f"{ref} asks for width {spec.hidden}, {spec.layers} layers and {spec.heads} heads",
            hint="give at least one layer and head, and a width that is a multiple of 2 * heads",
        )
    return spec


def _setting(ref: str, key: str, value: str) -> int | str:
    names = [f.name for f in fields(TinySpec) if f.name != "family"]
    if key == "vocab" and value in get_args(VocabName):
        return value
    whole = key in names and key != "vocab" and value.removeprefix("-").isdecimal()
    if whole and (key != "tied" or int(value) in (-1, 0, 1)):
        return int(value)
    raise ModelError(
        f"{ref} has the setting {key}={value!r}, which does not exist",
        hint=f"settings are {', '.join(names)}; whole numbers, but vocab is bytes or bpe",
    )


def tiny_model(spec: TinySpec, dtype: torch.dtype) -> PreTrainedModel:
    """Make a toy model with random weights, the same for the same settings.

    The global random state of torch is left as it was.

    Args:
        spec: Family and sizes.
        dtype: Arithmetic; the weights are drawn in float32 and rounded.

    Returns:
        A model on the CPU.
    """
    config = _CONFIGS[spec.family](spec, _common_settings(spec))
    auto = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    with torch.random.fork_rng(devices=[]):
        # Of the CPU alone, where all is drawn: torch's own function seeds every GPU too.
        torch.default_generator.manual_seed(spec.seed)
        model = auto.from_config(config, dtype=torch.float32)
        if spec.tied == 0:
            _untie(model)
        if spec.family == "bart":
            # Its decoder starts with the end of a text, and its first token is forced.
            model.generation_config.forced_bos_token_id = _BOS
        bias = getattr(model, "final_logits_bias", None)
        if isinstance(bias, torch.Tensor):
            bias.normal_()
    # Parameters alone, as from_pretrained does: rotary frequencies must stay in float32.
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model


def _untie(model: PreTrainedModel) -> None:
    # T5's configuration ties in any case; a checkpoint with two tables is loaded untied.
    head: Any = model.get_output_embeddings()
    if head.weight is model.get_input_embeddings().weight:
        head.weight = nn.Parameter(torch.randn_like(head.weight) * head.in_features**-0.5)


def tiny_tokenizer(spec: TinySpec) -> PreTrainedTokenizerFast:
    """Make the tokenizer of a toy model: token b is byte b, then <bos>, <eos>, <pad>, merges."""
    backend = _byte_tokenizer() if spec.vocab == "bytes" else _bpe_tokenizer()
    backend.add_special_tokens(list(_SPECIAL))
    if spec.family in _WANTS_BOS:
        backend.post_processor = processors.TemplateProcessing(
            single="<bos> $A", special_tokens=[("<bos>", _BOS)]
        )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>"
    )
    tokenizer.chat_template = _CHAT_TEMPLATE
    return tokenizer


def _common_settings(spec: TinySpec) -> dict[str, Any]:
    settings: dict[str, Any] = {
        "vocab_size": _BPE_TOKENS if spec.vocab == "bpe" else 256 + len(_SPECIAL),
        "bos_token_id": _BOS,
        "eos_token_id": _EOS,
        "pad_token_id": _PAD,
    }
    return settings if spec.tied < 0 else settings | {"tie_word_embeddings": bool(spec.tied)}


def _llama_like(config: Callable[..., PreTrainedConfig]) -> "_MakeConfig":
    def make(spec: TinySpec, common: Mapping[str, Any]) -> PreTrainedConfig:
        return config(
            hidden_size=spec.hidden,
            intermediate_size=2 * spec.hidden,
            num_hidden_layers=spec.layers,
            num_attention_heads=spec.heads,
            num_key_value_heads=spec.heads,
            head_dim=spec.hidden // spec.heads,
            max_position_embeddings=MAX_POSITIONS,
            **common,
        )

    return make


def _gpt2(spec: TinySpec, common: Mapping[str, Any]) -> PreTrainedConfig:
    return GPT2Config(
        n_embd=spec.hidden,
        n_layer=spec.layers,
        n_head=spec.heads,
        n_positions=MAX_POSITIONS,
        **common,
    )


def _t5(spec: TinySpec, common: Mapping[str, Any]) -> PreTrainedConfig:
    settings: dict[str, Any] = {**common, "decoder_start_token_id": _PAD}
    return T5Config(
        d_model=spec.hidden,
        d_ff=2 * spec.hidden,
        d_kv=spec.hidden // spec.heads,
        num_layers=spec.layers,
        num_heads=spec.heads,
        **settings,
    )


def _bart_like(config: Callable[..., PreTrainedConfig], **more: Any) -> "_MakeConfig":
    def make(spec: TinySpec, common: Mapping[str, Any]) -> PreTrainedConfig:
        sizes = {
            f"{side}_{name}": size
            for side in ("encoder", "decoder")
            for name, size in (
                ("layers", spec.layers),
                ("attention_heads", spec.heads),
                ("ffn_dim", 2 * spec.hidden),
            )
        }
        positions = {"max_position_embeddings": MAX_POSITIONS, "d_model": spec.hidden}
        return config(**common, **sizes, **positions, **more)

    return make


_MakeConfig = Callable[[TinySpec, Mapping[str, Any]], PreTrainedConfig]
_CONFIGS: Mapping[str, _MakeConfig] = {
    "llama": _llama_like(LlamaConfig),
    "qwen3": _llama_like(Qwen3Config),
    "gemma2": _llama_like(Gemma2Config),
    "gemma3": _llama_like(Gemma3TextConfig),
    "gpt2": _gpt2,
    "t5": _t5,
    "bart": _bart_like(BartConfig, decoder_start_token_id=_EOS),
    "marian": _bart_like(MarianConfig, decoder_start_token_id=_PAD),
}


def _byte_tokenizer() -> Tokenizer:
    return _byte_level(BPE(vocab=_base_vocabulary(), merges=[]), use_regex=False)


def _bpe_tokenizer() -> Tokenizer:
    merges = _learned_merges(_BPE_TOKENS - 256 - len(_SPECIAL))
    vocabulary = _base_vocabulary()
    for left, right in merges:
        vocabulary.setdefault(left + right, len(vocabulary))
    return _byte_level(BPE(vocab=vocabulary, merges=merges), use_regex=True)


def _base_vocabulary() -> dict[str, int]:
    vocabulary = dict(BYTE_BY_LETTER)
    return vocabulary | {name: 256 + n for n, name in enumerate(_SPECIAL)}


def _byte_level(model: BPE, *, use_regex: bool) -> Tokenizer:
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _learned_merges(count: int) -> list[tuple[str, str]]:
    text = files("trimtab").joinpath("data/tiny_corpus.txt").read_text(encoding="utf-8")
    learner = _byte_level(BPE(), use_regex=True)
    trainer = BpeTrainer(
        vocab_size=256 + count, initial_alphabet=list(BYTE_BY_LETTER), show_progress=False
    )
    learner.train_from_iterator([text], trainer)
    return [tuple(pair) for pair in json.loads(learner.to_str())["model"]["merges"]]
