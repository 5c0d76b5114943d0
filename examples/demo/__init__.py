"""The main job on real models: a small model learns Zig, a larger one is steered by it."""
