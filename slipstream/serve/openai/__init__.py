"""OpenAI's protocol with vLLM's additions: fields.py is what a caller may send, answers.py what comes back, routes.py
the endpoints; response_fields.py and responses.py are all of these for /v1/responses.
"""
