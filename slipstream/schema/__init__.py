"""The nouns that cross a border (process, disk, wire): frozen dataclasses of plain Python values, no torch."""
