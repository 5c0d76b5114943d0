"""What a full disk or a forbidden place says, whichever library met it."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from trimtab.errors import StorageError, TrimtabError

_SPACE = "free space on that disk or choose another folder, then run the same command again"
_RIGHTS = "choose a folder that you may write, or change its permissions"
_PLACE = "choose another path: a part of this one is not the file or folder that is needed"
_HINTS = {
    errno.ENOSPC: _SPACE,
    errno.EDQUOT: _SPACE,
    errno.EFBIG: _SPACE,
    errno.EROFS: _RIGHTS,
    errno.EACCES: _RIGHTS,
    errno.EPERM: _RIGHTS,
    errno.ENOTDIR: _PLACE,
    errno.EISDIR: _PLACE,
    errno.EEXIST: _PLACE,
    errno.ENAMETOOLONG: _PLACE,
}


@contextmanager
def storage_errors(path: Path) -> Iterator[None]:
    """Turn a full disk or a place that cannot be written into an error with a remedy.

    Covers OSError, and libraries that put the system's words into an error of their own
    (safetensors). Other exceptions pass unchanged.

    Args:
        path: What is being written; named unless the system names another file.

    Raises:
        StorageError: The disk is full, over quota or read-only, or the path cannot be written.
    """
    try:
        yield
    except TrimtabError:
        raise
    except Exception as error:
        number = _error_number(error)
        if number is None:
            raise
        named = getattr(error, "filename", None) or path
        raise StorageError(
            f"cannot write {named}: {os.strerror(number)}", hint=_HINTS[number]
        ) from error


def _error_number(error: Exception) -> int | None:
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno if error.errno in _HINTS else None
    return next((number for number in _HINTS if os.strerror(number) in str(error)), None)
