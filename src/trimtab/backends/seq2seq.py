"""What an encoder-decoder reads beside its own text: the source, and what begins a target."""

from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from trimtab.errors import ModelError

_PROBE = "The rudder, turned by 37 degrees"


def source_ids(tokenizer: PreTrainedTokenizerBase, text: str, *, markup: bool = False) -> list[int]:
    """Encode a source text, with the special tokens that the tokenizer puts around a source.

    Marian's and mBART's tokenizers read sources and targets in two ways; this is the source's.
    An end token is put after the source of a tokenizer that puts none of its own around it.

    Args:
        tokenizer: Of the encoder-decoder.
        text: Any text.
        markup: The names of special tokens in the text mean those tokens.
    """
    ids = _source(tokenizer, text, special=True, markup=markup)
    framed = len(ids) > len(_source(tokenizer, text, special=False, markup=markup))
    end = tokenizer.eos_token_id
    if framed or not isinstance(end, int) or ids[-1:] == [end]:
        return ids
    return [*ids, end]


def target_start(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Token ids that every target begins with, before its text.

    The first is the decoder's start token. A second follows where generation forces one
    (`forced_bos_token_id`: the language in NLLB, `<s>` in BART), or, in models that force none,
    where the tokenizer begins a target with one.

    Args:
        model: The encoder-decoder.
        tokenizer: Its tokenizer.

    Raises:
        ModelError: The model does not say how its decoder starts.
    """
    start = _setting(model, "decoder_start_token_id")
    if start is None:
        start = _setting(model, "bos_token_id")
    if start is None:
        raise ModelError(
            f"{type(model).__name__} does not say how its decoder starts",
            hint="put decoder_start_token_id into the model's config.json",
        )
    forced = _setting(model, "forced_bos_token_id")
    opening = _target_opening(tokenizer) if forced is None else [forced]
    # In some families the tokenizer's first token is the decoder's start itself.
    return [start, *(opening if opening != [start] else [])]


def max_source_tokens(model: PreTrainedModel) -> int | None:
    """Positions of the encoder; None where unbounded, as in T5."""
    config = model.config
    names = ("max_encoder_position_embeddings", "max_position_embeddings")
    return next((n for n in (getattr(config, name, None) for name in names) if n), None)


def _source(
    tokenizer: PreTrainedTokenizerBase, text: str, *, special: bool, markup: bool
) -> list[int]:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None and not markup:
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = True
        return list(backend.encode(text, add_special_tokens=special).ids)
    options: dict[str, Any] = {} if markup else {"split_special_tokens": True}
    return list(tokenizer(text, add_special_tokens=special, verbose=False, **options)["input_ids"])


def _target_opening(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    whole = list(tokenizer(text_target=_PROBE, verbose=False)["input_ids"])
    options: dict[str, Any] = {"add_special_tokens": False, "verbose": False}
    plain = list(tokenizer(text_target=_PROBE, **options)["input_ids"])
    places = (i for i in range(len(whole)) if whole[i : i + len(plain)] == plain)
    return whole[: next(places, 0)]


def _setting(model: PreTrainedModel, name: str) -> int | None:
    for holder in (getattr(model, "generation_config", None), model.config):
        value = getattr(holder, name, None)
        if isinstance(value, int):
            return value
    return None
