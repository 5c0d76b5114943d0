"""What the command line says when something goes wrong, and the exit status that goes with it."""

import errno
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import typer

from trimtab.errors import InputError, ModelError, StorageError, TrimtabError
from trimtab.machine import use_large_pages

DEBUG_VARIABLE = "TRIMTAB_DEBUG"
UNEXPECTED, EXPECTED, CUT_SHORT, STOPPED = 1, 2, 3, 130
"""Exit statuses; CUT_SHORT is of a text that a budget has ended."""

STOPPED_TEXT = "stopped; the same command goes on from what was saved, if anything was"


@contextmanager
def reported() -> Iterator[None]:
    """Turn every exception of a command into words on standard error and an exit status.

    Tracebacks are printed only with TRIMTAB_DEBUG=1.

    Raises:
        typer.Exit: With 2 for an error with a remedy, 130 for Ctrl-C, 1 for anything else; one
            that the command itself ends with is passed on.
    """
    try:
        yield
    except typer.Exit:
        raise
    except KeyboardInterrupt as error:
        _say(error, STOPPED_TEXT)
        raise typer.Exit(STOPPED) from None
    except Exception as error:
        if _was_interrupted(error):
            _say(error, STOPPED_TEXT)
            raise typer.Exit(STOPPED) from None
        expected = _expected(error)
        if expected is None:
            _say(error, _unexpected(error))
            raise typer.Exit(UNEXPECTED) from None
        _say(error, f"error: {expected.message}\n  hint: {expected.hint}")
        raise typer.Exit(EXPECTED) from None


def run_program(work: Callable[[], object]) -> None:
    """Run a program beside the command line: its large pages, messages and exit statuses.

    Args:
        work: All that the program does.
    """
    use_large_pages()
    try:
        with reported():
            work()
    except typer.Exit as end:
        sys.exit(end.exit_code)


def _was_interrupted(error: BaseException | None) -> bool:
    """Whether Ctrl-C lies behind an error: libraries wrap what stops their own imports."""
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__cause__ or error.__context__
    return error is not None


def _expected(error: Exception) -> TrimtabError | None:
    if isinstance(error, TrimtabError):
        return error
    if _is_full_disk(error):
        return StorageError(
            f"cannot write: {os.strerror(errno.ENOSPC)}",
            hint="free space on that disk or choose another folder, then run the same command"
            " again",
        )
    if isinstance(error, MemoryError) or "can't allocate memory" in str(error):
        return ModelError(
            "there is not enough memory",
            hint="use a smaller model, --dtype bfloat16, or smaller windows and batches",
        )
    if isinstance(error, OSError) and error.filename is not None:
        return InputError(
            f"cannot use {error.filename}: {error.strerror}",
            hint="check the path and its permissions",
        )
    return None


def _is_full_disk(error: Exception) -> bool:
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return True
    # Libraries in other languages pass on only the system's words.
    return os.strerror(errno.ENOSPC) in str(error)


def _unexpected(error: Exception) -> str:
    first_line = (str(error).strip().splitlines() or ["no message"])[0]
    return (
        f"unexpected error: {type(error).__name__}: {first_line}\n"
        f"  hint: set {DEBUG_VARIABLE}=1 to see where it happened, and report it"
    )


def _say(error: BaseException, text: str) -> None:
    if os.environ.get(DEBUG_VARIABLE) == "1":
        traceback.print_exception(error, file=sys.stderr)
    typer.echo(text, err=True)


def write(text: str) -> None:
    """Print a result; who reads it may leave."""
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except BrokenPipeError:
        # The reader (head, less) has gone; what Python still flushes at exit has to go nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise typer.Exit(1) from None
