"""Trimtab's speed beside the bare host, proxy tuning, assisted generation and LoRA, in one run."""
