"""Requests in the dialects that APIs speak. Pure."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from trimtab.hosted.capabilities import Capabilities

COMPLETIONS, CHAT, MESSAGES = "/completions", "/chat/completions", "/messages"


@dataclass(frozen=True)
class Prefix:
    """What a model is to go on from.

    Attributes:
        text: Of a text; of a chat the beginning of the answer.
        message: What the user says, in a chat.
        token_ids: The same text in tokens of the host, where it takes these; never in a chat.
    """

    text: str
    message: str | None = None
    token_ids: Sequence[int] | None = None


@dataclass(frozen=True)
class Wanted:
    """What is to come back.

    Attributes:
        max_tokens: Longest continuation.
        top: Likeliest tokens to show at each place; 0 for no logprobs.
        temperature: 0 takes the likeliest token.
        top_p: Draw from the smallest set of tokens with this much probability.
        count: Continuations.
        echo: Show the prompt's tokens as well.
    """

    max_tokens: int
    top: int = 0
    temperature: float = 0.0
    top_p: float = 1.0
    count: int = 1
    echo: bool = False


def completion(model: str, prefix: Prefix, wanted: Wanted, by: Capabilities) -> dict[str, Any]:
    """Ask /completions to continue a text."""
    prompt = prefix.text if prefix.token_ids is None else list(prefix.token_ids)
    body = _common(model, wanted, by) | {"prompt": prompt, "max_tokens": length(wanted, by)}
    if wanted.top:
        body["logprobs"] = wanted.top
    if wanted.echo:
        body["echo"] = True
    return body


def chat(model: str, prefix: Prefix, wanted: Wanted, by: Capabilities) -> dict[str, Any]:
    """Ask /chat/completions to answer a message, from a beginning of the answer if it has one."""
    body = _common(model, wanted, by) | {
        "messages": _messages(prefix),
        by.length_name: length(wanted, by),
    }
    if wanted.top:
        body |= {"logprobs": True, "top_logprobs": wanted.top}
    if prefix.text and by.prefill == "flagged":
        # vLLM's words for it.
        body |= {"continue_final_message": True, "add_generation_prompt": False}
    return body


def messages(model: str, prefix: Prefix, wanted: Wanted, by: Capabilities) -> dict[str, Any]:
    """Ask Anthropic's /messages to answer a message; each request gives one answer."""
    body: dict[str, Any] = {
        "model": model,
        "messages": _messages(prefix),
        "max_tokens": length(wanted, by),
    }
    if not by.takes_temperature:
        return body
    # It refuses the two together; its own temperature is 1.
    if wanted.temperature == 1 and wanted.top_p < 1:
        return body | {"top_p": wanted.top_p}
    return body | {"temperature": wanted.temperature}


def length(wanted: Wanted, by: Capabilities) -> int:
    """Longest continuation to ask for: what is wanted, or the least that the API takes."""
    return max(wanted.max_tokens, by.shortest_tokens)


def path_and_body(
    model: str, prefix: Prefix, wanted: Wanted, by: Capabilities
) -> tuple[str, Mapping[str, Any]]:
    """The request that an API with these capabilities understands."""
    if by.dialect == "anthropic":
        return MESSAGES, messages(model, prefix, wanted, by)
    if prefix.message is not None:
        return CHAT, chat(model, prefix, wanted, by)
    return COMPLETIONS, completion(model, prefix, wanted, by)


def _common(model: str, wanted: Wanted, by: Capabilities) -> dict[str, Any]:
    body: dict[str, Any] = {"model": model}
    if wanted.count > 1:
        body["n"] = wanted.count
    if by.takes_temperature:
        body["temperature"] = wanted.temperature
        if wanted.temperature or wanted.top_p < 1:
            # Said even where it is 1: some servers have another default.
            body["top_p"] = wanted.top_p
    return body


def _messages(prefix: Prefix) -> list[dict[str, str]]:
    found = [{"role": "user", "content": prefix.message or ""}]
    if prefix.text:
        found.append({"role": "assistant", "content": prefix.text})
    return found
