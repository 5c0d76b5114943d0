"""Calls of an API: patient, counted, kept on disk, and silent about the key."""

import json
import random
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any, TypeVar, final

from trimtab.errors import MissingDependencyError, ModelError
from trimtab.hosted.address import Address, after_failures, key_of, remedy
from trimtab.hosted.answers import Answers, BrokenAnswer
from trimtab.hosted.ledger import Ledger
from trimtab.store.files import sha256_bytes, write_json
from trimtab.store.home import read_kept, trimtab_home
from trimtab.types import OnNote

try:
    import httpx2
    import tenacity
except ImportError as _missing:
    raise MissingDependencyError(
        f"hosts behind an API need the package {_missing.name}",
        hint="pip install 'trimtab[hosted]'",
    ) from _missing

FIRST_WAIT_SEC, LONGEST_WAIT_SEC = 0.5, 60.0
"""Between attempts, where the API does not say how long."""

PATIENCE_SEC = 900.0
"""Longest time to wait that an API may ask for."""

SLEEP: Callable[[float], None] = time.sleep
"""How a client waits, unless told otherwise."""

MAX_ANSWER_BYTES = 1 << 28
_IMPOSSIBLE = -1e4
_SHOWN_CHARACTERS = 300
_PASSING = frozenset((408, 409, 425, 429, 500, 502, 503, 504, 520, 522, 524, 529))
_VERSION = 1
_ANTHROPIC_VERSION = "2023-06-01"

Parsed = TypeVar("Parsed")


class _PassingError(Exception):
    """A failure that may not come again."""

    def __init__(self, reason: str, wait_sec: float | None = None) -> None:
        super().__init__(reason)
        self.reason = reason
        self.wait_sec = wait_sec


@dataclass(frozen=True)
class Manners:
    """How an API is called.

    Attributes:
        timeout_sec: Longest time for one answer.
        attempts: Times that a request is sent before it has failed.
        requests_per_min: Most requests a minute; None for no bound.
        cache: Keep answers on disk.
    """

    timeout_sec: float = 120.0
    attempts: int = 8
    requests_per_min: float | None = None
    cache: bool = True


@final
class Client:
    """Calls one address."""

    def __init__(
        self,
        address: Address,
        manners: Manners,
        ledger: Ledger,
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] | None = None,
        on_note: OnNote | None = None,
    ) -> None:
        """Take the key from the environment; nothing is sent yet.

        Args:
            address: Where.
            manners: How.
            ledger: Counts what is used.
            clock: Seconds; for tests.
            sleep: Waits; for tests.
            on_note: Gets why and how long is waited before a request is sent again.

        Raises:
            InputError: The key holds characters that no key has.
        """
        self.address = address
        self.ledger = ledger
        self._manners = manners
        self._clock, self._sleep = clock, sleep or SLEEP
        self._on_note = on_note
        self._key = key_of(address)
        self._next_sec = -float("inf")
        self._http = httpx2.Client(timeout=manners.timeout_sec, headers=self._headers())

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def ask(
        self,
        path: str,
        body: Mapping[str, Any],
        read: Callable[[Mapping[str, Any]], Answers],
        *,
        ordinal: int = 0,
    ) -> Answers:
        """Send a request until it is answered whole, or give what was answered before.

        Args:
            path: Below the address.
            body: The request.
            read: Takes the answer apart; its BrokenAnswer is a reason to ask again.
            ordinal: Tells equal requests apart that are to have different answers.

        Raises:
            ModelError: The API refuses the request, or has failed at every attempt.
        """
        kept = self._kept(path, body, ordinal)
        if kept is not None and (raw := _read_kept(kept)) is not None:
            # What was damaged is asked for anew.
            with suppress(BrokenAnswer):
                found = read(raw)
                self.ledger.kept_calls += 1
                return found
        raw, found = self._patiently(lambda: self._parsed("POST", path, body, read))
        self.ledger.book(found.usage)
        if kept is not None:
            write_json(kept, {"schema": "trimtab-hosted-answer", "version": _VERSION, "raw": raw})
        return found

    def get(self, path: str) -> Mapping[str, Any]:
        """Fetch a description, such as the list of models; errors as for `ask`."""
        return self._patiently(lambda: self._parsed("GET", path, None, dict))[0]

    def try_once(
        self, path: str, body: Mapping[str, Any], read: Callable[[Mapping[str, Any]], Answers]
    ) -> Answers | str:
        """Ask whether a request is understood: its answer, or the API's refusal in words.

        Raises:
            ModelError: The key or the model is refused, or the API has failed at every attempt.
        """
        try:
            _, found = self._patiently(lambda: self._parsed("POST", path, body, read), broken=True)
        except _RefusedError as refusal:
            if refusal.status in (401, 402, 403):
                raise
            return refusal.message
        except BrokenAnswer as error:
            return str(error)
        self.ledger.book(found.usage)
        return found

    def _patiently(self, call: Callable[[], Parsed], *, broken: bool = False) -> Parsed:
        attempts = tenacity.Retrying(
            stop=tenacity.stop_after_attempt(self._manners.attempts),
            wait=self._wait_sec,
            retry=tenacity.retry_if_exception_type(_PassingError),
            before_sleep=self._count_failure,
            sleep=self._sleep,
            reraise=True,
        )
        try:
            return attempts(self._once, call, broken)
        except _PassingError as error:
            times = f" {n} times" if (n := self._manners.attempts) > 1 else ""
            raise ModelError(
                f"{self.address.url} has failed{times}: {error.reason}",
                hint=after_failures(self.address, self.ledger.calls, cache=self._manners.cache),
            ) from None

    def _once(self, call: Callable[[], Parsed], broken: bool) -> Parsed:
        self._keep_pace()
        try:
            return call()
        except BrokenAnswer as error:
            if broken:
                raise
            raise _PassingError(str(error)) from None

    def _keep_pace(self) -> None:
        if self._manners.requests_per_min is None:
            return
        now = self._clock()
        if now < self._next_sec:
            self._sleep(self._next_sec - now)
        self._next_sec = max(now, self._next_sec) + 60.0 / self._manners.requests_per_min

    def _wait_sec(self, state: tenacity.RetryCallState) -> float:
        outcome = state.outcome
        error = outcome.exception() if outcome else None
        if isinstance(error, _PassingError) and error.wait_sec is not None:
            return error.wait_sec
        longest = min(LONGEST_WAIT_SEC, FIRST_WAIT_SEC * 2.0 ** (state.attempt_number - 1))
        # Clients that failed together are not to come back together.
        return longest * random.uniform(0.5, 1.0)

    def _count_failure(self, state: tenacity.RetryCallState) -> None:
        self.ledger.failures += 1
        error = state.outcome.exception() if state.outcome else None
        wait_sec = state.next_action.sleep if state.next_action else 0.0
        if self._on_note is not None and isinstance(error, _PassingError):
            self._on_note(f"{error.reason}; trying again in {wait_sec:.0f} s")

    def _parsed(
        self,
        method: str,
        path: str,
        body: Mapping[str, Any] | None,
        read: Callable[[Mapping[str, Any]], Parsed],
    ) -> tuple[Mapping[str, Any], Parsed]:
        status, headers, content = self._exchange(method, path, body)
        if status != 200:
            raise self._refusal(status, headers, content)
        try:
            raw = json.loads(content, parse_constant=_finite)
        except ValueError:
            raise _PassingError(f"an answer of {len(content)} bytes that is no JSON") from None
        if not isinstance(raw, dict):
            raise _PassingError("an answer that is no JSON object")
        return raw, read(raw)

    def _exchange(
        self, method: str, path: str, body: Mapping[str, Any] | None
    ) -> tuple[int, Mapping[str, str], bytes]:
        end_sec, parts, size = self._clock() + self._manners.timeout_sec, [], 0
        try:
            with self._http.stream(method, f"{self.address.url}{path}", json=body) as answer:
                for part in answer.iter_bytes():
                    parts.append(part)
                    size += len(part)
                    # A read that never quite stops is no timeout to the transport.
                    if self._clock() > end_sec:
                        raise _PassingError(f"no answer in {self._manners.timeout_sec:g} s")
                    if size > MAX_ANSWER_BYTES:
                        raise _PassingError(f"an answer of more than {MAX_ANSWER_BYTES} bytes")
                return answer.status_code, answer.headers, b"".join(parts)
        except httpx2.TimeoutException:
            raise _PassingError(f"no answer in {self._manners.timeout_sec:g} s") from None
        except (httpx2.UnsupportedProtocol, httpx2.InvalidURL) as error:
            raise ModelError(
                f"{self.address.url} is no address of an API: {self._scrubbed(str(error))}",
                hint="give one such as http://127.0.0.1:8080/v1",
            ) from None
        except (httpx2.TransportError, httpx2.DecodingError) as error:
            reason = self._scrubbed(str(error)) or type(error).__name__
            raise _PassingError(f"the connection failed: {reason}") from None

    def _refusal(self, status: int, headers: Mapping[str, str], content: bytes) -> Exception:
        said = self._scrubbed(_message(content))[:_SHOWN_CHARACTERS]
        exhausted = status == 429 and "insufficient_quota" in content.decode("utf-8", "replace")
        if status in _PASSING and not exhausted:
            wait_sec = _retry_after_sec(headers.get("retry-after"))
            if wait_sec is None or wait_sec <= PATIENCE_SEC:
                return _PassingError(f"status {status}: {said}", wait_sec)
            said = f"it asks to wait {wait_sec:.0f} s; {said}"
        return _RefusedError(
            f"{self.address.url} refuses with status {status}: {said}",
            hint=remedy(status, self.address),
            status=status,
        )

    def _headers(self) -> dict[str, str]:
        if self.address.dialect == "anthropic":
            version = {"anthropic-version": _ANTHROPIC_VERSION}
            return version | ({"x-api-key": self._key} if self._key else {})
        return {"authorization": f"Bearer {self._key}"} if self._key else {}

    def _scrubbed(self, text: str) -> str:
        # A service may repeat in a refusal what it was sent.
        return text.replace(self._key, "[key]") if self._key else text

    def _kept(self, path: str, body: Mapping[str, Any], ordinal: int) -> Path | None:
        if not self._manners.cache:
            return None
        asked = [_VERSION, self.address.url, path, body, ordinal]
        name = sha256_bytes(json.dumps(asked, sort_keys=True).encode())
        return trimtab_home() / "hosted" / "answers" / name[:2] / f"{name}.json"


@final
class _RefusedError(ModelError):
    """The API has understood a request and will not answer it."""

    def __init__(self, message: str, *, hint: str, status: int) -> None:
        super().__init__(message, hint=hint)
        self.status = status


def _message(content: bytes) -> str:
    text = content.decode("utf-8", "replace")
    try:
        raw = json.loads(text)
        error = raw.get("error", raw) if isinstance(raw, dict) else raw
        text = str(error.get("message", error) if isinstance(error, dict) else error)
    except ValueError:
        pass
    return " ".join(text.split()) or "without a reason"


def _finite(name: str) -> float | None:
    """Stands for a number that JSON does not have: the impossible's log-probability, or none."""
    return _IMPOSSIBLE if name == "-Infinity" else None


def _retry_after_sec(value: str | None) -> float | None:
    """Seconds that a Retry-After header asks for: a number, or a date."""
    if not value:
        return None
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
    except ValueError:
        return None


def _read_kept(path: Path) -> Mapping[str, Any] | None:
    kept = read_kept(path) or {}
    raw = kept.get("raw")
    return raw if kept.get("version") == _VERSION and isinstance(raw, dict) else None
