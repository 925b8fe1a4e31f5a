"""The rewrites, one a file. Each holds PASS (what it does to a graph) and example() (a graph it changes, which is its test)."""
