"""At which level a host behind an API is steered: by what it shows, or by text alone."""

from typing import Literal

from trimtab.config import GenerateConfig
from trimtab.errors import InputError, ModelError
from trimtab.hosted.capabilities import Capabilities

Level = Literal["alone", "top-k", "text"]


def level_of(config: GenerateConfig, by: Capabilities, *, steered: bool) -> Level:
    """The best level that a host allows, or the one that is asked for.

    Args:
        config: What is asked.
        by: What the host can do.
        steered: An adapter is to steer it.

    Raises:
        ModelError: It shows no log-probabilities where these are asked for.
        InputError: `top_k` where no log-probabilities are used.
    """
    if not steered:
        level: Level = "alone"
    elif config.api_level == "text" or not by.top(chat=config.chat):
        level = "text"
    else:
        level = "top-k"
    if level == "text" and config.api_level == "top-k":
        raise ModelError(
            f"{config.host} shows no log-probabilities that can be steered here",
            hint="see `trimtab hosts probe`; --api-level auto chooses among candidates instead",
        )
    if level != "top-k" and config.top_k:
        raise InputError(
            "--top-k needs log-probabilities, and none are used here", hint="leave it out"
        )
    return level


def in_words(config: GenerateConfig, by: Capabilities, level: Level) -> str:
    """What is used of the host, for people."""
    if level == "alone":
        return "the host alone, unsteered"
    if level == "text":
        seen = ", all having seen the expert's draft" if config.api_draft_tokens else ""
        return (
            f"text only: of {config.api_candidates} candidates the one that the expert finds"
            f" likeliest{seen}"
        )
    return f"top {by.top(chat=config.chat)} logprobs, blended with expert and reference"
