"""How carriers are made from a recording."""
