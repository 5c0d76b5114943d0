"""Who may ask a server, and how often."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import final

from trimtab.errors import InputError
from trimtab.serving.keys import KeyEntry, read_keys
from trimtab.serving.refusals import ApiError


@dataclass
class _Bucket:
    tokens: float
    filled_sec: float


@final
class Doorkeeper:
    """Says who may ask, and how often."""

    def __init__(
        self,
        path: Path | None,
        requests_per_minute: int | None,
        *,
        complain: Callable[[str], None] = lambda _: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Read the keys.

        Args:
            path: The file of keys; None lets everybody in.
            requests_per_minute: Of keys without a limit of their own.
            complain: Told once when the file cannot be read any more, which locks everybody out.
            clock: Seconds; for tests.

        Raises:
            InputError: The file cannot be read, or has no key.
        """
        self._path = path
        self._limit = requests_per_minute
        self._complain = complain
        self._is_broken = False
        self._clock = clock
        self._buckets: dict[str, _Bucket] = {}
        self._entries: tuple[KeyEntry, ...] = ()
        self._read_at: tuple[int, int] | None = None
        if path:
            read_some_keys(path)

    @property
    def asks_for_keys(self) -> bool:
        """Whether anybody needs a key."""
        return self._path is not None

    def _current(self) -> tuple[KeyEntry, ...]:
        """The keys as they are now: one that is taken out of the file opens nothing any more."""
        assert self._path is not None
        try:
            # Before reading: a file that changes meanwhile is read again.
            stat = self._path.stat()
            found_at = stat.st_mtime_ns, stat.st_ino
            if found_at != self._read_at:
                self._entries, self._read_at = read_some_keys(self._path), found_at
            self._is_broken = False
        except (OSError, InputError) as error:
            # Without a readable file nobody can be told from anybody else.
            self._entries, self._read_at = (), None
            if not self._is_broken:
                self._complain(f"no key opens anything until it is mended: {error}")
            self._is_broken = True
        return self._entries

    def admit(self, authorization: str | None, *, admin: bool = False) -> KeyEntry | None:
        """Say whose request it is.

        Args:
            authorization: The header, `Bearer KEY`.
            admin: The request needs a key that may administer.

        Returns:
            The key's entry; None where nobody needs a key.

        Raises:
            ApiError: 401 without a valid key, 403 if it may not do that.
        """
        if not self.asks_for_keys:
            if admin:
                raise ApiError(
                    403, "adapters are loaded at run time with an admin key only: serve with --keys"
                )
            return None
        scheme, _, given = (authorization or "").partition(" ")
        found = None
        # All are compared, so that the time says nothing about which one was nearly right.
        for entry in self._current():
            if entry.opens(given.strip()):
                found = entry
        if found is None or scheme.lower() != "bearer":
            raise ApiError(
                401,
                "a valid API key is needed: Authorization: Bearer KEY",
                code="invalid_api_key",
                headers={"www-authenticate": "Bearer"},
            )
        if admin and not found.admin:
            raise ApiError(403, "this key may not administer adapters", code="not_an_admin")
        return found

    def count(self, entry: KeyEntry | None) -> None:
        """Count a request against the limit of its key, a bucket that fills evenly.

        Raises:
            ApiError: 429 with Retry-After where the bucket is empty.
        """
        own = entry.requests_per_minute if entry else None
        limit = own if own is not None else self._limit
        if limit is None:
            return
        name, now_sec = entry.name if entry else "", self._clock()
        bucket = self._buckets.setdefault(name, _Bucket(float(limit), now_sec))
        filled = (now_sec - bucket.filled_sec) * limit / 60.0
        bucket.tokens, bucket.filled_sec = min(float(limit), bucket.tokens + filled), now_sec
        if bucket.tokens < 1.0:
            wait_sec = int((1.0 - bucket.tokens) * 60.0 / limit) + 1
            raise ApiError(
                429,
                f"this key may ask {limit} times a minute",
                code="rate_limit_exceeded",
                headers={"retry-after": str(wait_sec)},
            )
        bucket.tokens -= 1.0


def read_some_keys(path: Path) -> tuple[KeyEntry, ...]:
    """Read a file of keys that has at least one.

    Raises:
        InputError: It cannot be read, or has none.
    """
    entries = read_keys(path)
    if not entries:
        raise InputError(f"{path} has no key", hint="make one with `trimtab key NAME --keys FILE`")
    return entries
