"""ReDrafter: a small recurrent network drafts beams from the model's hidden state (arXiv:2403.09919)."""
