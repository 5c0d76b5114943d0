"""Models whose positions or caches are not those of single tokens."""

from inspect import signature

from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from trimtab.backends.hf import HFModel

_LENGTH_DEPENDENT = {"dynamic", "longrope"}


def positions_follow_length(model: HFModel) -> bool:
    """Whether a model rotates all tokens of a pass by frequencies for the longest text in it."""
    return bool(_rope_types(model.model.config.get_text_config(decoder=True)) & _LENGTH_DEPENDENT)


def takes_cache(model: HFModel) -> bool:
    """Whether a model goes on from what it has read; a few old families (GPT, XLM) cannot."""
    return "past_key_values" in signature(model.model.base_model.forward).parameters


def keeps_single_tokens(model: HFModel) -> bool:
    """Whether what a decoder-only model keeps of a text is keys and values of its tokens alone.

    Recurrent layers keep more.
    """
    if not takes_cache(model):
        return False
    layers = DynamicCache(config=model.model.config.get_text_config(decoder=True)).layers
    others = {type(layer) for layer in layers} - {DynamicLayer, DynamicSlidingWindowLayer}
    return not others and not getattr(model.model, "_is_stateful", False)


def _rope_types(config: object) -> set[str]:
    given = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    # Models with several kinds of layers have parameters for each.
    tables = [given, *(value for value in given.values() if isinstance(value, dict))]
    return {str(table.get("rope_type", table.get("type", ""))) for table in tables}
