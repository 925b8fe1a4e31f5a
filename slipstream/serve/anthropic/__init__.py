"""Anthropic's protocol: fields.py is what a caller may send, answers.py what comes back, routes.py the endpoints."""
