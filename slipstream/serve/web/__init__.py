"""The page at /: files as they are, which speak to the server as any other client does."""
