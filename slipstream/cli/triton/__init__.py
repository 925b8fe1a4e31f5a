"""Serve through NVIDIA's Triton Inference Server: write a model repository, fill it in, launch it."""
