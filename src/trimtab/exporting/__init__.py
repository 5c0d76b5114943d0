"""Adapters in forms that other engines load, and what each engine refuses."""
