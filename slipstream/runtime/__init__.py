"""Runs an engine: which sequences get how many tokens (scheduler, torch-free), what the device does with them (worker).

Holds no model code: it reads the engine folder and replays its graph. One step is plan → launch → collect → commit.
"""
