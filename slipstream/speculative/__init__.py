"""Speculative decoding: drafts are cheap guesses of what comes next, and one step of the model verifies many.

drafter.py   what proposes drafts; each method is a folder with a drafter.py, and a head.py where it has weights
tree.py      the shape of drafts: which follows which
choices.py   trees that are written down
accept.py    which of them the model's own choices confirm
training.py  what is trained (slipstream/distill); a method that can be has a training.py in its folder
"""
