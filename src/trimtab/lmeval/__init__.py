"""Steered hosts in EleutherAI's lm-evaluation-harness (`pip install 'trimtab[lmeval]'`)."""
