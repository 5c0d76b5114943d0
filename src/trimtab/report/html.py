"""Pieces of HTML that pages and their parts share. Pure but for the style sheet."""

import re
from collections.abc import Iterable
from html import escape
from importlib import resources

from trimtab.report.words import printable


def page_html(title: str, parts: Iterable[str], footer: str, script: str = "") -> str:
    """A whole page that loads nothing, light and dark, for screens of any width.

    Args:
        title: Its name and heading, as text.
        parts: HTML below the heading; empty ones are left out.
        footer: HTML at its end.
        script: A <script> element, or nothing.
    """
    return "\n".join(
        (
            "<!DOCTYPE html>",
            '<html lang="en"><head><meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            '<meta name="color-scheme" content="light dark">',
            f"<title>{text_html(title)}</title>",
            f"<style>\n{data_text('report.css')}</style></head>",
            f"<body><main><h1>{text_html(title)}</h1>",
            *(part for part in parts if part),
            f"<footer>{footer}</footer>",
            f"</main>{script}</body></html>\n",
        )
    )


def data_text(name: str) -> str:
    """A text file that the package carries."""
    return (resources.files("trimtab") / "data" / name).read_text(encoding="utf-8")


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
