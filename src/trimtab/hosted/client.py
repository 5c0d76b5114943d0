"""Calls of an API: patient, counted, kept on disk, and silent about the key."""

import json
import random
import re
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, final

from trimtab.errors import MissingDependencyError, ModelError, NumericalError
from trimtab.hosted.address import CHANGED, Address, after_failures, key_of, remedy
from trimtab.hosted.answers import Answers, BrokenAnswer, MissingLogprobsError, usage_of
from trimtab.hosted.counting import Counts
from trimtab.hosted.failures import (
    TOO_DEEP,
    FailedError,
    PassingError,
    RefusedError,
    message_of,
    retry_after_sec,
    target_of,
)
from trimtab.hosted.ledger import Ledger, Usage
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
_KEY = "[key]"
"""Stands where a key was."""

_KEY_CHARACTERS = 8
"""No service's key is shorter; a placeholder such as "none" may well be a word of an answer."""

_PASSING = frozenset((408, 409, 425, 429, 500, 502, 503, 504, 520, 522, 524, 529))
_OF_ALL_REQUESTS = frozenset((401, 402, 403))
"""Statuses of refusals that say nothing of what was asked."""

_VERSION = 1
_ANTHROPIC_VERSION = "2023-06-01"

Parsed = TypeVar("Parsed")
Reader = Callable[[Mapping[str, Any]], Answers]
"""Takes an answer apart; its BrokenAnswer says that it lacks something."""


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
        self.counts = Counts()
        self.doubts_tokens = False
        self._manners = manners
        self._clock, self._sleep = clock, sleep or SLEEP
        self._on_note = on_note
        self._key = key_of(address)
        self._key_in_json = _in_json(self._key)
        self._model: str | None = ""
        self._next_sec = -float("inf")
        self._http = httpx2.Client(timeout=manners.timeout_sec, headers=self._headers())

    def keep_for(self, model: str | None) -> None:
        """Use and keep answers of one of the models that have answered here; None: of none."""
        self._model = model

    def doubt_tokens(self, why: str) -> None:
        """Count no longer by the tokenizer that was named, and say why, once."""
        if self._on_note is not None and not self.doubts_tokens:
            self._on_note(
                f"the tokenizer that --api-tokenizer names seems not to be this host's: {why};"
                " name the host's own, or leave it out: tokens are then told from what the API"
                " shows"
            )
        self.doubts_tokens = True

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def ask(
        self,
        path: str,
        body: Mapping[str, Any],
        read: Reader,
        *,
        ordinal: int = 0,
        estimate: Usage | None = None,
    ) -> Answers:
        """Send a request until it is answered whole, or give what was answered before.

        Args:
            path: Below the address.
            body: The request.
            read: Takes the answer apart; its BrokenAnswer is a reason to ask again.
            ordinal: Tells equal requests apart that are to have different answers.
            estimate: What is booked where the API does not say what the answer took.

        Raises:
            ModelError: The API refuses the request, has failed at every attempt, or has answered
                without what was asked for, and the budget allows no other attempt.
        """
        kept = self._kept(path, body, ordinal)
        if kept is not None and (raw := _read_kept(kept)) is not None:
            # What was damaged is asked for anew.
            with suppress(BrokenAnswer):
                found = read(raw)
                self.ledger.kept_calls += 1
                self.counts.learn(body, usage_of(raw))
                return found
        return self._patiently(lambda: self._whole(path, body, read, kept, estimate))

    def get(self, path: str) -> Mapping[str, Any]:
        """Fetch a description, such as the list of models; errors as for `ask`."""
        return self._patiently(lambda: self._parsed("GET", path, None))

    def try_once(
        self,
        path: str,
        body: Mapping[str, Any],
        read: Reader,
        *,
        estimate: Usage | None = None,
    ) -> Answers | str:
        """Ask whether a request is understood: its answer, or in words what came instead.

        Raises:
            RefusedError: For a reason that passes, or that holds for all requests, such as the key.
            FailedError: The API has failed at every attempt.
        """
        try:
            raw = self._patiently(lambda: self._parsed("POST", path, body))
        except RefusedError as refusal:
            if refusal.status in _OF_ALL_REQUESTS | _PASSING:
                raise
            return refusal.message
        self._book(body, usage_of(raw), estimate)
        try:
            return read(raw)
        except BrokenAnswer as error:
            return self._shown(str(error))

    def _whole(
        self,
        path: str,
        body: Mapping[str, Any],
        read: Reader,
        kept: Path | None,
        estimate: Usage | None,
    ) -> Answers:
        """An answer that has what was asked for, booked and kept."""
        raw = self._parsed("POST", path, body)
        usage = usage_of(raw)
        try:
            found = read(raw)
        except BrokenAnswer as error:
            hint = CHANGED if isinstance(error, MissingLogprobsError) else ""
            reason = self._shown(str(error))
            if usage is not None:
                self._book(body, usage)
                if not self.ledger.allows(estimate or Usage()):
                    raise ModelError(
                        f"{reason}, and the budget of tokens allows no other attempt",
                        hint=hint or "give a larger --api-budget-tokens",
                    ) from None
            is_booked = usage is not None
            raise PassingError(reason, is_booked=is_booked, hint=hint) from None
        self._book(body, usage, estimate)
        if kept is not None:
            _keep(kept, raw)
        return found

    def _book(
        self, body: Mapping[str, Any], usage: Usage | None, estimate: Usage | None = None
    ) -> None:
        self.ledger.book(usage, estimate)
        self.counts.learn(body, usage)

    def _patiently(self, call: Callable[[], Parsed]) -> Parsed:
        def paced() -> Parsed:
            self._keep_pace()
            return call()

        attempts = tenacity.Retrying(
            stop=tenacity.stop_after_attempt(self._manners.attempts),
            wait=self._wait_sec,
            retry=tenacity.retry_if_exception_type(PassingError),
            before_sleep=self._count_failure,
            sleep=self._sleep,
            reraise=True,
        )
        try:
            return attempts(paced)
        except PassingError as error:
            times = f" {n} times" if (n := self._manners.attempts) > 1 else ""
            cache = self._manners.cache
            raise FailedError(
                f"{self.address.url} has failed{times}: {error.reason}",
                hint=error.hint or after_failures(self.address, self.ledger.calls, cache=cache),
                status=error.status,
            ) from None

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
        asked_sec = error.wait_sec if isinstance(error, PassingError) else None
        longest = min(LONGEST_WAIT_SEC, FIRST_WAIT_SEC * 2.0 ** (state.attempt_number - 1))
        # Clients that failed together are not to come back together.
        return max(asked_sec or 0.0, longest * random.uniform(0.5, 1.0))

    def _count_failure(self, state: tenacity.RetryCallState) -> None:
        error = state.outcome.exception() if state.outcome else None
        # What is booked as a call has not failed to be counted.
        if not (isinstance(error, PassingError) and error.is_booked):
            self.ledger.failures += 1
        wait_sec = state.next_action.sleep if state.next_action else 0.0
        if self._on_note is not None and isinstance(error, PassingError):
            self._on_note(f"{error.reason}; trying again in {wait_sec:.0f} s")

    def _parsed(
        self, method: str, path: str, body: Mapping[str, Any] | None = None
    ) -> Mapping[str, Any]:
        status, headers, content = self._exchange(method, path, body)
        if status != 200:
            raise self._refusal(status, headers, content)
        if len(self._key) >= _KEY_CHARACTERS:
            content = self._key_in_json.sub(_KEY.encode(), content)
        try:
            raw = json.loads(content, parse_constant=_finite)
        except ValueError:
            raise PassingError(f"an answer of {len(content)} bytes that is no JSON") from None
        except RecursionError:
            raise PassingError(f"an answer of {len(content)} bytes, {TOO_DEEP}") from None
        if not isinstance(raw, dict):
            raise PassingError("an answer that is no JSON object")
        return raw

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
                        raise PassingError(f"no answer in {self._manners.timeout_sec:g} s")
                    if size > MAX_ANSWER_BYTES:
                        raise PassingError(f"an answer of more than {MAX_ANSWER_BYTES} bytes")
                return answer.status_code, answer.headers, b"".join(parts)
        except httpx2.TimeoutException:
            raise PassingError(f"no answer in {self._manners.timeout_sec:g} s") from None
        except (httpx2.UnsupportedProtocol, httpx2.InvalidURL) as error:
            raise ModelError(
                f"{self.address.url} is no address of an API: {self._shown(str(error))}",
                hint="give one such as http://127.0.0.1:8080/v1",
            ) from None
        except (httpx2.TransportError, httpx2.DecodingError) as error:
            reason = self._shown(str(error)) or type(error).__name__
            raise PassingError(f"the connection failed: {reason}") from None

    def _refusal(self, status: int, headers: Mapping[str, str], content: bytes) -> Exception:
        if 300 <= status < 400 and "location" in headers:
            url = self._shown(target_of(self.address.url, headers["location"]))
            return RefusedError(
                f"{self.address.url} redirects to {url} (status {status}), and redirects are not"
                " followed",
                hint="where you trust that address, give it, up to its version, in place of this",
                status=status,
            )
        said = self._shown(message_of(content))
        exhausted = status == 429 and "insufficient_quota" in content.decode("utf-8", "replace")
        if status in _PASSING and not exhausted:
            wait_sec = retry_after_sec(headers.get("retry-after"))
            if wait_sec is None or wait_sec <= PATIENCE_SEC:
                return PassingError(f"status {status}: {said}", wait_sec=wait_sec, status=status)
            said = f"it asks to wait {wait_sec:.0f} s; {said}"
        return RefusedError(
            f"{self.address.url} refuses with status {status}: {said}",
            hint=remedy(status, self.address),
            status=status,
        )

    def _headers(self) -> dict[str, str]:
        if self.address.dialect == "anthropic":
            version = {"anthropic-version": _ANTHROPIC_VERSION}
            return version | ({"x-api-key": self._key} if self._key else {})
        return {"authorization": f"Bearer {self._key}"} if self._key else {}

    def _shown(self, text: str) -> str:
        """What a service says, for people."""
        # It may repeat what it was sent.
        text = text.replace(self._key, _KEY) if self._key else text
        return text[:_SHOWN_CHARACTERS]

    def _kept(self, path: str, body: Mapping[str, Any], ordinal: int) -> Path | None:
        if not self._manners.cache or self._model is None:
            return None
        asked = [_VERSION, self.address.url, path, body, ordinal, self._model]
        name = sha256_bytes(json.dumps(asked, sort_keys=True).encode())
        return trimtab_home() / "hosted" / "answers" / name[:2] / f"{name}.json"


def _finite(name: str) -> float | None:
    """Stands for a number that JSON does not have: the impossible's log-probability, or none."""
    return _IMPOSSIBLE if name == "-Infinity" else None


def _in_json(key: str) -> re.Pattern[bytes]:
    """Finds a key of ASCII characters, any of which may be escaped."""
    each = (rf"(?:\\?{re.escape(c)}|\\u(?i:{ord(c):04x}))" for c in key)
    return re.compile("".join(each).encode())


def _keep(path: Path, raw: Mapping[str, Any]) -> None:
    """Write an answer, unless it holds what no file of ours can hold."""
    # An infinite number, half of a character, or too many levels.
    with suppress(NumericalError, UnicodeEncodeError, RecursionError):
        write_json(path, {"schema": "trimtab-hosted-answer", "version": _VERSION, "raw": raw})


def _read_kept(path: Path) -> Mapping[str, Any] | None:
    kept = read_kept(path) or {}
    raw = kept.get("raw")
    return raw if kept.get("version") == _VERSION and isinstance(raw, dict) else None
