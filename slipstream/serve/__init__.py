"""The server: HTTP in front, each engine in a process of its own.

supervisor.py is the parent of all processes; front_process.py runs app.py, the application of one front. openai/ is a
protocol, fields.py what the bodies of several have in common, chats.py their conversations, turns.py answers in blocks,
replies.py how answers leave; frontend.py is the asyncio side of the process border, with a connection.py to each engine
and a router.py that chooses one, messages.py what crosses the border, engine_process.py the other side. The fronts
import no torch.
"""
