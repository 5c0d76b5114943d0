"""Forms in which an adapter carries expertise."""
