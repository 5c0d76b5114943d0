"""How an API wants to be asked, told from the words of its refusals. Pure."""

import re
from typing import Any

from trimtab.hosted.capabilities import Capabilities

LENGTHS_TOKENS = (1, 16, 128, 1024)
"""Bounds on an answer's length to try: some models think first, and may not be stopped in it."""

_OF_LENGTH = re.compile(r"max_\w*tokens|output limit|output tokens")
_TOO_SHORT = re.compile(r"small|short|least|minimum|below|greater|higher|larger|increase|>")


def asked_otherwise(by: Capabilities, said: str) -> Capabilities | None:
    """Another way to ask a question that was refused.

    Args:
        by: How it was asked.
        said: The refusal.

    Returns:
        The way; None where none is left that the refusal speaks for.
    """
    said = said.lower()
    if by.takes_temperature and "temperature" in said:
        return _with(by, takes_temperature=False)
    if _OF_LENGTH.search(said) and _TOO_SHORT.search(said):
        longer = (tokens for tokens in LENGTHS_TOKENS if tokens > by.shortest_tokens)
        tokens = next(longer, None)
        return None if tokens is None else _with(by, shortest_tokens=tokens)
    return None


def named_otherwise(by: Capabilities) -> Capabilities | None:
    """The same with the other name for the length of a chat's answer, where it has one."""
    if by.dialect == "anthropic" or by.length_name != "max_tokens":
        return None
    return _with(by, length_name="max_completion_tokens")


def _with(by: Capabilities, **update: Any) -> Capabilities:
    return by.model_copy(update=update)
