"""Distilling: a drafter learns to say what its target says, from the target's own texts.

texts.py   the target answers prompts, its own or given ones; kept as JSON lines
hidden.py  what the target's head reads at each token of these texts, by the same engine; kept until training is done
train.py   the loop: batches, checkpoints, what was held out
speculative/<method>/training.py   what is trained
"""
