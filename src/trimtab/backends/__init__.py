"""Models that can be experts or hosts."""
