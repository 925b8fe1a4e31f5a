"""EAGLE: one decoder layer that goes on from the model's own hidden states (arXiv:2401.15077, 2503.01840)."""
