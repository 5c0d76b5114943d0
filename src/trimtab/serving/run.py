"""A server that listens: in the foreground, or in a thread of its own."""

import asyncio
import logging
import math
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any, TextIO, final

import uvicorn

from trimtab.backends.hf import HFModel
from trimtab.backends.open import open_model
from trimtab.config import ServeConfig
from trimtab.errors import InputError
from trimtab.serving.adapters import check_adapter_name
from trimtab.serving.app import make_app
from trimtab.serving.doorkeeper import read_some_keys
from trimtab.serving.gate import is_loopback
from trimtab.serving.http import Http
from trimtab.serving.service import Service
from trimtab.serving.watch import Watch
from trimtab.store.manifest import read_manifest
from trimtab.types import Progress, silent

_START_SEC = 120.0
_BACKLOG = 2048
_TELLING_SEC = 5
"""Time to tell requests that the server does not wait for them any longer."""
KEEP_ALIVE_SEC = 15
"""Idle connections end later than the clients' own, five seconds in OpenAI's client and in
uvicorn: where both end at once, a request meets with a connection that is just being closed."""
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


@final
class _Uvicorn(uvicorn.Server):
    """Says that it is not ready any more when it is asked to end, and tells those it waits for."""

    def __init__(self, config: uvicorn.Config, service: Service) -> None:
        super().__init__(config)
        self._service = service

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self._service.is_closing = True
        super().handle_exit(sig, frame)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """What has not ended in time is told so: uvicorn alone would cut it off without a word."""
        engine, patience_sec = self._service.engine, self._service.config.shutdown_sec
        timer = asyncio.get_running_loop().call_later(patience_sec, engine.close)
        try:
            await super().shutdown(sockets)
        finally:
            timer.cancel()

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Both signals are how a server is meant to end: neither is raised again afterwards."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {sig: signal.signal(sig, self.handle_exit) for sig in _SIGNALS}
        try:
            yield
        finally:
            for sig, handler in before.items():
                signal.signal(sig, handler)


def check_listening(config: ServeConfig) -> None:
    """Refuse to be reachable by others without keys.

    Raises:
        InputError: The address is no loopback address, and there is no file of keys.
    """
    if config.keys is None and not is_loopback(config.address):
        raise InputError(
            f"{config.address} can be reached from other machines, and no API keys are given",
            hint="give --keys FILE (`trimtab key NAME --keys FILE` makes it), or listen on"
            " 127.0.0.1",
        )


def check_beforehand(config: ServeConfig) -> None:
    """Refuse what cannot be served before anything large is opened.

    Raises:
        InputError: As `check_listening`; or the keys cannot be read, the address or port cannot be
            used, or an adapter's name cannot be one.
        AdapterError: A folder holds no adapter.
    """
    check_listening(config)
    if config.keys:
        read_some_keys(config.keys)
    for name, folder in config.adapters():
        check_adapter_name(name)
        read_manifest(folder)
    with _listening(config):
        pass


@contextmanager
def opened(
    config: ServeConfig,
    *,
    host: HFModel | None = None,
    log: TextIO | None = None,
    progress: Progress = silent,
) -> Iterator[Service]:
    """Open the host, mount the adapters, and run the engine inside the context.

    Args:
        config: The server's.
        host: The host that the configuration names, if it is open already.
        log: Where lines of JSON go; None for nowhere.
        progress: Shows the opening and the mounting.

    Raises:
        TrimtabError: Something cannot be opened or does not fit.
    """
    check_beforehand(config)
    host = host or open_model(
        config.host, dtype=config.dtype, device_map=config.device_map, progress=progress
    )
    service = Service(config, host, log)
    try:
        for name, folder in config.adapters():
            service.adapters.load(name, folder, progress=progress)
        service.engine.start()
        yield service
    finally:
        service.close()


def run(config: ServeConfig, service: Service) -> None:
    """Listen until Ctrl-C or SIGTERM; requests in flight then have time to end.

    Raises:
        InputError: The address or the port cannot be used.
    """
    watch = service.watch
    # In the foreground the process is the server's: whatever it has to say is a line of the log.
    with _logged("uvicorn", watch), _logged("asyncio", watch), _listening(config) as listener:
        address = f"http://{_shown(listener)}"
        names = service.adapters.model_names()
        watch.say("listening", address=address, models=names)
        _server(config, service).run(sockets=[listener])
    watch.say("stopped")


@dataclass(frozen=True)
class Running:
    """A server in a thread of its own.

    Attributes:
        base_url: Where it listens, without a slash at the end.
        service: What answers.
        stop: Begins to end it, as SIGTERM does, and returns at once.
    """

    base_url: str
    service: Service
    stop: Callable[[], None]


@contextmanager
def running(
    config: ServeConfig, *, host: HFModel | None = None, log: TextIO | None = None
) -> Iterator[Running]:
    """Serve inside the context, for tests and notebooks; arguments are those of `opened`."""
    with ExitStack() as stack:
        service = stack.enter_context(opened(config, host=host, log=log))
        stack.enter_context(_logged("uvicorn", service.watch))
        listener = stack.enter_context(_listening(config))
        server = _server(config, service)
        options: dict[str, Any] = {"sockets": [listener]}
        thread = threading.Thread(target=server.run, kwargs=options, name="trimtab-http")
        thread.start()

        def stop() -> None:
            service.is_closing = server.should_exit = True

        try:
            deadline_sec = time.monotonic() + _START_SEC
            while not server.started and time.monotonic() < deadline_sec and thread.is_alive():
                time.sleep(0.01)
            yield Running(f"http://{_shown(listener)}", service, stop)
        finally:
            stop()
            thread.join()


def _server(config: ServeConfig, service: Service) -> uvicorn.Server:
    settings = uvicorn.Config(
        make_app(service),
        log_config=None,
        access_log=False,
        lifespan="off",
        http=Http,
        ws="none",
        server_header=False,
        timeout_keep_alive=KEEP_ALIVE_SEC,
        timeout_graceful_shutdown=math.ceil(config.shutdown_sec) + _TELLING_SEC,
    )
    return _Uvicorn(settings, service)


@final
class _LogLines(logging.Handler):
    """Makes lines of the log of what libraries have to say."""

    def __init__(self, watch: Watch) -> None:
        super().__init__(logging.WARNING)
        self._watch = watch

    def emit(self, record: logging.LogRecord) -> None:
        """Write a record."""
        error = record.exc_info[1] if record.exc_info else None
        what = None if error is None else f"{type(error).__name__}: {error}"
        level, message = record.levelname.lower(), record.getMessage().strip()
        self._watch.say("http", level=level, message=message, error=what)


@contextmanager
def _logged(logger: str, watch: Watch) -> Iterator[None]:
    lines = _LogLines(watch)
    logging.getLogger(logger).addHandler(lines)
    try:
        yield
    finally:
        logging.getLogger(logger).removeHandler(lines)


@contextmanager
def _listening(config: ServeConfig) -> Iterator[socket.socket]:
    family = socket.AF_INET6 if ":" in config.address else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((config.address.strip("[]"), config.port))
        # From now on nobody is turned away: who comes early waits.
        listener.listen(_BACKLOG)
    except OSError as error:
        listener.close()
        raise InputError(
            f"cannot listen on {config.address} port {config.port}: {error.strerror or error}",
            hint="give another --address or --port; --port 0 takes a free one",
        ) from error
    with listener:
        yield listener


def _shown(listener: socket.socket) -> str:
    address, port = listener.getsockname()[:2]
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"
