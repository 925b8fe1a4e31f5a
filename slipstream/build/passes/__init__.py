"""The rewrites, one a file: PASS (what it does to a graph) and example() (a graph it changes, which is its test)."""
