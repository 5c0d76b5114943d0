"""How programs of Trimtab's own use the machine that they run on."""

import os
from pathlib import Path

_MEMORY = Path("/proc/meminfo")


def use_large_pages() -> None:
    """Have torch ask the kernel for large pages, unless the user's environment decides.

    A step of a model gets and returns arrays of tens of megabytes; to be handed them anew in
    pages of 4 kB takes a tenth of its time (docs/log.md, 2026-11-26). Torch reads the variable
    at its first array. Called by programs, not on import: it changes the whole process.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")


def share_cores() -> None:
    """Have torch's threads wait for each other asleep, unless the user's environment decides.

    GNU's OpenMP waits in a loop for a long while. Where anything else runs on these cores, small
    steps then take up to nine times as long (docs/log.md, 2026-11-27 and 2026-11-28); a short
    loop costs little where nothing does. The library reads the variable when it is loaded, thus
    this works before torch is imported alone.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "2000")


def free_memory_bytes() -> int:
    """Memory that is free for one more process; half of all where the system does not say."""
    available = told_bytes(_MEMORY, "MemAvailable:")
    if available is None:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    return available


def told_bytes(path: Path, name: str) -> int | None:
    """A size that a file of Linux's /proc tells in kibibytes; None where it does not."""
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(name)), None)
