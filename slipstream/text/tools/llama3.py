"""Llama 3.1, 3.2 and 3.3: {"name": …, "parameters": {…}}, several with ; between them.

They begin the answer, or follow <|python_tag|>. A built-in tool's call, which is Python and not JSON, stays content.
"""

from slipstream.text.tools.scanner import Scanner, Steps

TAG = "<|python_tag|>"
BEGIN, BETWEEN, END = (), ("; ",), ()


def read(text: Scanner) -> Steps[None]:
    yield from text.next_of(TAG)
    while True:
        is_call = yield from text.call()
        if is_call and (yield from text.next_of(";")):
            continue
        if not (yield from text.content_until(TAG)):
            return
