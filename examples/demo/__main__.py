"""`make demo`, or `python -m examples.demo` in an environment that has Trimtab."""

from examples.demo.run import main

main()
