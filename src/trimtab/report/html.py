"""Small pieces of HTML that the parts of the page share. Pure."""

import re
from html import escape

from trimtab.report.words import printable


def text_html(text: str) -> str:
    """Escape text for an element or a quoted attribute; control characters become signs."""
    return escape(printable(text))


def sentence_html(text: str) -> str:
    """Escape a sentence, and keep a figure with its error and its unit on one line."""
    return re.sub(r"(?<=\d) (?=[±%])|(?<=±) ", "\u00a0", text_html(text))


def scroll_html(table: str, label: str) -> str:
    """Put a table into a frame that scrolls by itself, also by keyboard."""
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{text_html(label)}">'
        f"{table}</div>"
    )


def pre_html(text: str, label: str, name: str = "plain") -> str:
    """Show text with its white space, in a frame that scrolls by itself."""
    # A parser drops one line break right after <pre>; this one is there to be dropped.
    return (
        f'<pre class="{name}" tabindex="0" role="region" aria-label="{text_html(label)}">'
        f"\n{text_html(text)}</pre>"
    )
