"""Serve a host, alone or steered by adapters, to OpenAI's clients."""

import sys
from importlib.util import find_spec
from typing import TextIO

from trimtab.backends.hf import HFModel
from trimtab.config import ServeConfig
from trimtab.errors import MissingDependencyError
from trimtab.types import Progress, silent

NEEDED = ("fastapi", "uvicorn", "prometheus_client")


def serve(
    config: ServeConfig,
    *,
    host: HFModel | None = None,
    progress: Progress = silent,
    log: TextIO | None = None,
) -> None:
    """Listen and answer until Ctrl-C or SIGTERM.

    With vLLM as its engine this process becomes vLLM's server, and does not return.

    Args:
        config: What to serve, and where.
        host: The host that the configuration names, if it is open already.
        progress: Shows the opening and the mounting.
        log: Where lines of JSON go (default: standard error).

    Raises:
        MissingDependencyError: The extra `serve` (or, for its engine, `vllm`) is not installed.
        InputError: The address needs keys or cannot be used, or the keys cannot be read.
        AdapterError: An adapter is broken or does not fit the host.
        ModelError: The host cannot be opened, or cannot be batched.
    """
    if config.engine == "vllm":
        from trimtab.vllm.launch import prepared

        prepared(config).run()
    missing = [name for name in NEEDED if find_spec(name) is None]
    if missing:
        raise MissingDependencyError(
            f"serving needs {', '.join(missing)}, which is not installed",
            hint="pip install 'trimtab[serve]'",
        )
    from trimtab.serving.run import opened, run

    with opened(config, host=host, log=log or sys.stderr, progress=progress) as service:
        run(config, service)
