"""How programs of Trimtab's own use the machine that they run on."""

import os


def use_large_pages() -> None:
    """Have torch ask the kernel for large pages, unless the user's environment decides.

    A step of a model gets and returns arrays of tens of megabytes; to be handed them anew in
    pages of 4 kB takes a tenth of its time (docs/log.md, 2026-11-26). Torch reads the variable
    at its first array. Called by programs, not on import: it changes the whole process.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
