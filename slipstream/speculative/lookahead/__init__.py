"""Lookahead: the model makes its own n-grams, in rows beside the text (arXiv:2402.02057)."""
