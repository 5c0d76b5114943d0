"""How an expert is trained: text, schedule, loop and checkpoints."""
