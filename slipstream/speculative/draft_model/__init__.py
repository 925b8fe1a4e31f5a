"""Draft and target: a small model says what the large one may say (arXiv:2211.17192, 2302.01318)."""
