"""Models whose positions are not those of single tokens."""

from trimtab.backends.hf import HFModel

_LENGTH_DEPENDENT = {"dynamic", "longrope"}


def positions_follow_length(model: HFModel) -> bool:
    """Whether a model rotates all tokens of a pass by frequencies for the longest text in it."""
    return bool(_rope_types(model.model.config.get_text_config(decoder=True)) & _LENGTH_DEPENDENT)


def _rope_types(config: object) -> set[str]:
    given = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    # Models with several kinds of layers have parameters for each.
    tables = [given, *(value for value in given.values() if isinstance(value, dict))]
    return {str(table.get("rope_type", table.get("type", ""))) for table in tables}
