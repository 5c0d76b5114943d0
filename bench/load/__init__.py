"""Load and faults: a server as a process, and clients that mean well and that do not."""
