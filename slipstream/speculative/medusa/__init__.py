"""Medusa: heads beside the model's own, each of which says a token further ahead (arXiv:2401.10774)."""
