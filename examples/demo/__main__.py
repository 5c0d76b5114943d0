"""`make demo`, or `python -m examples.demo` in an environment that has Trimtab."""

from trimtab.machine import share_cores

share_cores()

# Only now: it loads torch, which must find what is set.
from examples.demo.run import main  # noqa: E402

main()
