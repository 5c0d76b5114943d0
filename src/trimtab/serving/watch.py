"""What an operator sees of a server: metrics for Prometheus, and one line of JSON a request."""

import json
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, TextIO, final

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from trimtab.serving.engine import Engine

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_SECONDS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)


@dataclass
class Record:
    """What becomes known of a request on its way.

    Attributes:
        method: Of HTTP.
        route: The path's pattern, never the path itself, of which there may be any number.
        id: Names the request in the log and in the response.
        key: Name of the API key, if one was given.
        model: As the request has it, once it is known to be served.
        fields: More for the log; of a refusal its `code`, since its words may quote the request.
        began_sec: When it came.
    """

    method: str
    route: str
    id: str
    key: str | None = None
    model: str | None = None
    fields: dict[str, Any] = field(default_factory=dict)
    began_sec: float = field(default_factory=time.monotonic)

    def failed(self, error: Exception) -> None:
        """Note what went wrong, for the log alone."""
        self.fields["error"] = ": ".join(filter(None, (type(error).__name__, str(error))))


@final
class Watch:
    """Counts requests and writes them down. Safe from any thread."""

    def __init__(self, engine: Engine, log: TextIO | None) -> None:
        """Begin to count.

        Args:
            engine: Whose state the gauges show.
            log: Where lines go; None for nowhere.
        """
        self._log = log
        self._lock = threading.Lock()
        self._registry = registry = CollectorRegistry()
        self._requests = Counter(
            "trimtab_requests", "Requests.", ["route", "status"], registry=registry
        )
        self._seconds = Histogram(
            "trimtab_request_seconds",
            "Time of a request, to its last byte.",
            ["route"],
            buckets=_SECONDS,
            registry=registry,
        )
        self._first = Histogram(
            "trimtab_first_text_seconds",
            "Time to the first text of an answer.",
            buckets=_SECONDS,
            registry=registry,
        )
        self._read = Counter("trimtab_prompt_tokens", "Tokens read.", ["model"], registry=registry)
        self._written = Counter(
            "trimtab_completion_tokens", "Tokens written.", ["model"], registry=registry
        )
        gauges: dict[str, tuple[str, Callable[[], float]]] = {
            "queue": ("Requests that wait.", lambda: engine.waiting),
            "running": ("Answers in the making.", lambda: engine.running),
            "slots": ("Answers in the making at most.", lambda: engine.slots),
            "steps": ("Passes of the host so far.", lambda: engine.counts.steps),
            "step_rows": ("Answers in all these passes.", lambda: engine.counts.stepped_rows),
        }
        for name, (meaning, value) in gauges.items():
            Gauge(f"trimtab_{name}", meaning, registry=registry).set_function(value)

    def ended(self, record: Record, status: int) -> None:
        """Count a request and write its line.

        Args:
            record: What is known of it.
            status: Of the response; 499 where the client has gone before.
        """
        took_sec = time.monotonic() - record.began_sec
        self._requests.labels(record.route, str(status)).inc()
        self._seconds.labels(record.route).observe(took_sec)
        fields = record.fields
        if record.model is not None and "completion_tokens" in fields:
            self._read.labels(record.model).inc(fields["prompt_tokens"])
            self._written.labels(record.model).inc(fields["completion_tokens"])
        if fields.get("first_text_sec") is not None:
            self._first.observe(fields["first_text_sec"])
        self.say(
            "request",
            id=record.id,
            method=record.method,
            route=record.route,
            status=status,
            sec=round(took_sec, 4),
            key=record.key,
            model=record.model,
            **fields,
        )

    def say(self, event: str, **fields: object) -> None:
        """Write a line: strict JSON, what is not known left out."""
        if self._log is None:
            return
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        known = {name: value for name, value in fields.items() if value is not None}
        line = json.dumps({"time": now, "event": event, **known})
        with self._lock:
            self._log.write(f"{line}\n")
            self._log.flush()

    def metrics(self) -> bytes:
        """All figures in Prometheus's text form."""
        return generate_latest(self._registry)
