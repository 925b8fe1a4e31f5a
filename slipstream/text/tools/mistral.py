"""Mistral: [TOOL_CALLS][{"name": …, "arguments": {…}}, …], and since tokenizer v11 [TOOL_CALLS]name[ARGS]{…} for each.

In the second form [CALL_ID] and an id may follow the name, and [ARGS] may be missing.
"""

import re

from slipstream.text.tools.scanner import Scanner, Steps

TAG = "[TOOL_CALLS]"
BEGIN, BETWEEN, END = (TAG, "["), (", ",), ("]",)

_NAME = re.compile(r"[\w.:/\s-]*")
_ID = re.compile(r"\w*")


def read(text: Scanner) -> Steps[None]:
    while (yield from text.content_until(TAG)):
        if (yield from text.next_of("[")):
            yield from _array(text)
        else:
            yield from _named(text)


def _array(text: Scanner) -> Steps[None]:
    while (yield from text.call()):
        if (yield from text.next_of(",", "]")) != ",":
            text.settle()
            return


def _named(text: Scanner) -> Steps[None]:
    name = (yield from text.read_while(_NAME)).strip()
    if name not in text.names:
        text.give_back()
        return
    if (yield from text.next_of("[CALL_ID]")):
        yield from text.read_while(_ID)
    yield from text.next_of("[ARGS]")
    yield from text.call(name)
