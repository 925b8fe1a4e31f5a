"""A mirror of the package; `story/` is the one to read first, `surface/` holds what others rely on."""
