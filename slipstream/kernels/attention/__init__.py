"""Attention over a paged KV cache, and the tensors that describe a step to it."""
