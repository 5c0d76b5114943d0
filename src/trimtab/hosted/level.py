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


def check_sampling(config: GenerateConfig, by: Capabilities, level: Level) -> None:
    """Refuse lengths and draws that an API cannot be asked for, before anything is sent.

    Raises:
        InputError: It takes longer answers only, or temperature and top_p not together.
    """
    if level == "top-k":
        return
    if config.max_new_tokens < by.shortest_tokens:
        raise InputError(
            f"{config.host} takes no bound below {by.shortest_tokens} tokens on an answer, and"
            f" --max-new-tokens is {config.max_new_tokens}",
            hint=f"use --max-new-tokens {by.shortest_tokens} or more",
        )
    is_greedy = not config.temperature and level == "alone"
    both = config.top_p < 1 and config.temperature != 1 and not is_greedy
    if by.dialect == "anthropic" and by.takes_temperature and both:
        raise InputError(
            f"{config.host} takes either a temperature or --top-p, and here both are needed",
            hint="leave out --top-p, or give --temperature 1",
        )


def own_draws(config: GenerateConfig, by: Capabilities, level: Level) -> list[str]:
    """What to know, for people, where a host draws in its own way."""
    is_plain = config.temperature == 1 and config.top_p == 1 and not config.top_k
    if by.takes_temperature or (level == "top-k" and not is_plain):
        return []
    note = f"{config.host} lets nobody choose a temperature or top-p: its own apply"
    if level == "alone" and not config.temperature:
        note += ", and the text is a draw where temperature 0 asks for the likeliest"
    return [note]
