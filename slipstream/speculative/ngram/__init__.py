"""Prompt lookup: what followed the last tokens where the text had them before."""
