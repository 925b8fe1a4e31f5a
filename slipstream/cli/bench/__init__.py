"""Measure: what a machine can do, and what of that an engine makes use of."""
