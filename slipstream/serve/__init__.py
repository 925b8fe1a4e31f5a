"""The server: HTTP in front, the engine in a process of its own.

app.py is the server as a whole, openai/ a protocol, replies.py how answers leave; frontend.py is the asyncio side of
the process border, messages.py what crosses it, engine_process.py the other side. The front imports no torch.
"""
