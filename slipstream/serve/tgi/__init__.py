"""The protocol of Hugging Face's text-generation-inference: fields.py is what a caller may send, answers.py what comes
back, routes.py the endpoints.
"""
