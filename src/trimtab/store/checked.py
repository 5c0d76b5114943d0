"""Large files that were read and hashed before, so that opening them does not read them again."""

import json
import time
from contextlib import suppress
from pathlib import Path

from trimtab.errors import StorageError
from trimtab.store.files import sha256_bytes, sha256_file, write_json
from trimtab.store.home import read_kept, trimtab_home

KEPT_BYTES = 64 * 2**20
"""Files from this size on are kept in mind; smaller ones are read in a moment."""

SETTLED_SEC = 2.0
"""A file that was changed less long ago is not kept in mind: another change might bear the same
time, as far as file systems tell times apart."""


def checked_sha256(path: Path) -> str:
    """Fingerprint of a file's content; a large file is read once for each state of it.

    A state is what the file system says of it: place, number, size, and the times of the last
    change of content and of anything else. The last of these cannot be set by a program, so a
    change goes unseen only where the disk itself fails.

    Raises:
        OSError: The file cannot be read.
    """
    state = _state(path)
    size, changed_sec = path.stat().st_size, path.stat().st_ctime
    if size < KEPT_BYTES:
        return sha256_file(path)
    place = trimtab_home() / "checked" / f"{sha256_bytes(state.encode())}.json"
    kept = (read_kept(place) or {}).get("sha256")
    if isinstance(kept, str):
        return kept
    found = sha256_file(path)
    if _state(path) == state and time.time() - changed_sec > SETTLED_SEC:
        # Without room to keep it, the next opening takes longer, and that is all.
        with suppress(StorageError):
            write_json(place, {"sha256": found})
    return found


def _state(path: Path) -> str:
    stat = path.stat()
    told = [stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]
    return json.dumps([str(path.resolve()), *told])
