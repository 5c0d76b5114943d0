"""Chats under a model's own template: as training text, and as the prompt of an answer."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from trimtab.backends.hf import HFModel
from trimtab.backends.prefix import common_length
from trimtab.errors import InputError

Rendered = tuple[str, tuple[tuple[int, int], ...]]
"""A text and the character ranges [start, end) of the assistant's replies in it."""


def chat_renderer(model: HFModel) -> Callable[[Sequence[Mapping[str, str]]], Rendered]:
    """Make the `render_chat` of `read_documents` from a model's template.

    A reply's range runs to the end of its turn, so that its end token is learnt too, where the
    template renders the messages so far as a beginning of all; elsewhere it is the content.

    Args:
        model: The model whose template is used.
    """

    def render(messages: Sequence[Mapping[str, str]]) -> Rendered:
        text = model.chat_text(messages, add_generation_prompt=False)
        return text, _reply_spans(model, messages, text)

    return render


def _reply_spans(
    model: HFModel, messages: Sequence[Mapping[str, str]], text: str
) -> tuple[tuple[int, int], ...]:
    spans = []
    cursor = 0
    for count, message in enumerate(messages, start=1):
        content = message["content"].strip()
        start = text.find(content, cursor)
        if start < 0:
            raise InputError(
                f"the chat template of {model.ref} does not show the content of message {count}",
                hint="check the messages' roles and contents, or use another model",
            )
        cursor = start + len(content)
        if message["role"] == "assistant":
            so_far = model.chat_text(messages[:count], add_generation_prompt=False).rstrip()
            whole = text.startswith(so_far) and len(so_far) >= cursor
            cursor = len(so_far) if whole else cursor
            spans.append((start, cursor))
    return tuple(spans)


@dataclass(frozen=True)
class ChatPrompt:
    """A user's message as a host and the small models beside it read it, each in its own template.

    Attributes:
        token_ids: What the host reads before its answer.
        message: Places of the message itself among them; none in an encoder-decoder, whose answer
            is a text of its own.
        opening_ids: What the small models read before the message; None without a template: what
            they expect before any text.
        small_ids: What the small models read before the answer.
    """

    token_ids: tuple[int, ...]
    message: range
    opening_ids: tuple[int, ...] | None = None
    small_ids: tuple[int, ...] = ()


def chat_prompt(host: HFModel, message: str, small: HFModel | None = None) -> ChatPrompt:
    """Render a message for a host and, where there is one, for the small model beside it.

    Args:
        host: Must have a chat template.
        message: What the user says.
        small: Reads the plain message where it has no chat template.

    Raises:
        ModelError: The host has no chat template, or a template refuses the message.
    """
    return conversation_prompt(host, [{"role": "user", "content": message}], small)


def conversation_prompt(
    host: HFModel, messages: Sequence[Mapping[str, str]], small: HFModel | None = None
) -> ChatPrompt:
    """Render a conversation for a host and, where there is one, for the small model beside it.

    The last message of the user is the one that counts as text; what was said before it is part of
    the opening, as a template is.

    Args:
        host: Must have a chat template.
        messages: Each with `role` and `content`, one of them at least the user's.
        small: Reads the plain last message where it has no chat template.

    Raises:
        ModelError: The host has no chat template, or a template refuses the messages.
    """
    last = max(n for n, message in enumerate(messages) if message["role"] == "user")
    message = messages[last]["content"]

    def rendered(model: HFModel, content: str) -> list[int]:
        said = [*messages[:last], {**messages[last], "content": content}, *messages[last + 1 :]]
        return prompt_ids(model, model.chat_text(said), markup=True)

    ids, places = _located(message, lambda text: rendered(host, text))
    if host.is_encoder_decoder:
        places = range(0)
    if small is None:
        return ChatPrompt(tuple(ids), places)
    if not small.tokenizer.chat_template:
        return ChatPrompt(tuple(ids), places, None, tuple(prompt_ids(small, message)))
    small_ids, shown = _located(message, lambda text: rendered(small, text))
    return ChatPrompt(tuple(ids), places, tuple(small_ids[: shown.start]), tuple(small_ids))


def chat_ids(model: HFModel, message: str) -> list[int]:
    """Encode a user's message in the model's chat template, up to where the answer begins.

    Raises:
        ModelError: The model has no chat template, or its template refuses the message.
    """
    text = model.chat_text([{"role": "user", "content": message}])
    return prompt_ids(model, text, markup=True)


def prompt_ids(model: HFModel, text: str, *, markup: bool = False) -> list[int]:
    """Encode a text with the special tokens that the model expects around a prompt.

    Args:
        model: Reads it.
        text: At least one character.
        markup: As in `HFModel.encode`.
    """
    if model.is_encoder_decoder:
        return model.encode_source(text, markup=markup)
    ids = model.encode(text, markup=markup)
    first = model.first_ids
    # A chat template spells out the first token; not all of them do.
    text_ids = ids[len(first) :] if ids[: len(first)] == first else ids
    return model.context_ids() + text_ids


def _located(message: str, read: Callable[[str], list[int]]) -> tuple[list[int], range]:
    """A prompt's tokens, and which of them change when the message is another."""
    edges = message.strip()[:1] + message.strip()[-1:]
    other = next(letter for letter in "xyz" if letter not in edges)
    ids, others = read(message), read(other)
    start = common_length(ids, others)
    after = common_length(ids[start:][::-1], others[start:][::-1])
    return ids, range(start, len(ids) - after)
