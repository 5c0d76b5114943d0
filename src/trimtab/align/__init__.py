"""From a small model's next-token distribution to a host's tokens, on bytes. Pure."""
