"""Chat records as training text: rendered by a model's template, replies marked."""

from collections.abc import Callable, Mapping, Sequence

from trimtab.backends.hf import HFModel
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
