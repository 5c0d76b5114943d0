"""`trimtab serve` as a process of its own: started, watched, killed, started again."""

import json
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import psutil

START_SEC = 120.0
STOP_SEC = 60.0


@dataclass(frozen=True)
class Held:
    """What a process holds.

    Attributes:
        rss_bytes: Resident memory.
        descriptors: Open files and sockets.
        threads: Threads.
    """

    rss_bytes: int
    descriptors: int
    threads: int


@final
class Server:
    """A server, always at the same address, with one log for all its lives."""

    def __init__(self, words: Sequence[str], log: Path) -> None:
        """Choose a free port.

        Args:
            words: Of the command line, after `serve`.
            log: Where its standard error goes.
        """
        with socket.create_server(("127.0.0.1", 0)) as listener:
            self.port: int = listener.getsockname()[1]
        self.base_url = f"http://127.0.0.1:{self.port}"
        self._words = [sys.executable, "-m", "trimtab", "serve", *words, "--port", str(self.port)]
        self._log = log
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def process(self) -> subprocess.Popen[bytes]:
        """The process, which has been started."""
        assert self._process is not None
        return self._process

    @property
    def is_running(self) -> bool:
        """Whether the process lives."""
        return self._process is not None and self._process.poll() is None

    def start(self) -> float:
        """Start and wait until it listens; the seconds that took.

        Raises:
            RuntimeError: It ended, or did not listen in time.
        """
        begin_sec, size = time.monotonic(), self._log.stat().st_size if self._log.exists() else 0
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(self._words, stderr=log)
        while b'"listening"' not in self._log.read_bytes()[size:]:
            if not self.is_running or time.monotonic() > begin_sec + START_SEC:
                said = self._log.read_bytes()[size:].decode("utf-8", "replace")
                raise RuntimeError(f"the server did not start: {said[-2000:]}")
            time.sleep(0.05)
        return time.monotonic() - begin_sec

    def kill(self) -> None:
        """End it as a machine that fails does."""
        self.process.kill()
        self.process.wait(STOP_SEC)

    def ask_to_end(self) -> None:
        """Send SIGTERM."""
        self.process.send_signal(signal.SIGTERM)

    def wait(self) -> int:
        """The exit code, once it has ended."""
        return self.process.wait(STOP_SEC)

    def held(self) -> Held:
        """What it holds now."""
        process = psutil.Process(self.process.pid)
        with process.oneshot():
            return Held(process.memory_info().rss, process.num_fds(), process.num_threads())

    def log_lines(self) -> Iterator[dict[str, Any]]:
        """All lines of the log; what is no line of JSON is one of event `not JSON`."""
        for line in self._log.read_text("utf-8", "replace").splitlines():
            try:
                found = json.loads(line)
            except ValueError:
                found = None
            is_line = isinstance(found, dict) and "event" in found
            yield found if is_line else {"event": "not JSON", "text": line}
