"""The border between build and runtime: a folder on disk.

The build writes it, the runtime reads it, and neither imports the other.
"""
