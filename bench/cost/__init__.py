"""Measurements and published figures that the cost model is checked against."""
