"""What goes wrong when an API is called: what passes, what does not, and what it says itself."""

import json
import time
from email.utils import parsedate_to_datetime
from typing import Any, final
from urllib.parse import urljoin, urlsplit

from trimtab.errors import ModelError

TOO_DEEP = "nested deeper than can be read"
"""Of JSON, in words."""


@final
class RefusedError(ModelError):
    """The API has understood a request and will not answer it."""

    def __init__(self, message: str, *, hint: str, status: int) -> None:
        """Keep the HTTP status beside the words."""
        super().__init__(message, hint=hint)
        self.status = status


@final
class FailedError(ModelError):
    """The API has failed at every attempt."""

    def __init__(self, message: str, *, hint: str, status: int | None) -> None:
        """Keep the HTTP status of the last attempt; None where there was no such answer."""
        super().__init__(message, hint=hint)
        self.status = status


@final
class PassingError(Exception):
    """A failure that may not come again."""

    def __init__(
        self,
        reason: str,
        *,
        wait_sec: float | None = None,
        status: int | None = None,
        is_booked: bool = False,
        hint: str = "",
    ) -> None:
        """Keep what a further attempt, or its end, needs to know.

        Args:
            reason: In words.
            wait_sec: How long the API asks to wait; None where it does not say.
            status: Of HTTP; None where there was no such answer, or one of another kind.
            is_booked: The answer has been counted as a call.
            hint: What to do if it comes at every attempt (default: what is told for all).
        """
        super().__init__(reason)
        self.reason = reason
        self.wait_sec = wait_sec
        self.status = status
        self.is_booked = is_booked
        self.hint = hint


def message_of(content: bytes) -> str:
    """An API's own words in a refusal, in one line that can be printed."""
    text = content.decode("utf-8", "replace")
    try:
        return words_of(json.loads(text))
    except (ValueError, RecursionError):
        return _in_one_line(text)


def words_of(raw: Any) -> str:
    """The same of a refusal's JSON."""
    error = raw.get("error", raw) if isinstance(raw, dict) else raw
    return _in_one_line(str(error.get("message", error) if isinstance(error, dict) else error))


def _in_one_line(text: str) -> str:
    """A text that can be printed."""
    # Halves of characters, which JSON can hold and nothing can print.
    text = text.encode("utf-8", "replace").decode()
    return " ".join(text.split()) or "without a reason"


def target_of(url: str, location: str) -> str:
    """Where a redirect points, without what may be a secret: user name, query and fragment."""
    try:
        found = urlsplit(urljoin(f"{url}/", location))
        port = f":{found.port}" if found.port else ""
    except ValueError:
        return "an address that cannot be read"
    return _in_one_line(f"{found.scheme}://{found.hostname or ''}{port}{found.path}")


def retry_after_sec(value: str | None) -> float | None:
    """Seconds that a Retry-After header asks for: a number, or a date."""
    if not value:
        return None
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
    except (ValueError, OverflowError):
        return None
