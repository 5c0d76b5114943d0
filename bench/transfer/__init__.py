"""The transfer benchmark suite."""
