"""Hosts behind an API: what they show, what it costs, and steering them from outside."""
