"""What adapting a large model costs: floating-point operations, memory, hours, money.

Pure functions over a dated sheet of hardware, prices and factors (`sheet.json`); docs/cost.md
explains them and compares them with measurements.
"""
