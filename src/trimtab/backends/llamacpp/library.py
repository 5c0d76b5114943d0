"""The C library of llama.cpp through llama-cpp-python's ctypes bindings, made silent."""

import ctypes
from collections import deque
from functools import cache
from importlib import import_module
from typing import Any

from trimtab.errors import MissingDependencyError, ModelError

MAX_ROWS = 256
"""Sequences that llama.cpp keeps side by side at most (its LLAMA_MAX_SEQ)."""

IN_TORCH = "run the small model in torch: name its file without llamacpp:"
"""What to do where llama.cpp cannot run an expert."""

_ERROR_LEVEL = 3
_said: deque[str] = deque(maxlen=4)
_callbacks: list[Any] = []
"""Called from C for as long as the process runs, so never collected."""


@cache
def library() -> Any:
    """llama-cpp-python's low-level interface, whose log is kept from the terminal.

    Raises:
        MissingDependencyError: It is not installed.
        ModelError: Its library cannot be loaded.
    """
    try:
        module: Any = import_module("llama_cpp.llama_cpp")
    except ImportError as error:
        raise MissingDependencyError(
            "a host in llama.cpp needs llama-cpp-python, which is not installed",
            hint="pip install 'trimtab[llamacpp]' (it compiles llama.cpp, which takes a C++"
            " compiler and half an hour on two cores); without llamacpp: the file runs in torch",
        ) from error
    except (OSError, RuntimeError) as error:
        raise ModelError(
            f"llama.cpp's library cannot be loaded: {error}",
            hint="install llama-cpp-python again, compiled on this machine",
        ) from error
    callback = module.llama_log_callback(_listen)
    _callbacks.append(callback)
    module.llama_log_set(callback, ctypes.c_void_p(0))
    module.llama_backend_init()
    return module


def has_tiles() -> bool:
    """Whether llama.cpp was compiled to multiply by a processor's tile registers (AMX)."""
    return b"AMX_INT8 = 1" in library().llama_print_system_info()


def last_words() -> str:
    """The last errors that llama.cpp has logged, for a message; they are then forgotten."""
    words = "; ".join(line for line in _said if line)
    _said.clear()
    return words or "llama.cpp gives no reason"


def _listen(level: int, text: bytes, data: Any) -> None:
    del data
    if level == _ERROR_LEVEL:
        _said.append(text.decode("utf-8", "replace").strip())
