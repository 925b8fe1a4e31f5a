"""Hermes 2 Pro, Qwen 2.5 and Qwen 3: <tool_call>{"name": …, "arguments": {…}}</tool_call>, one after the other."""

from slipstream.text.tools.scanner import Scanner, Steps

OPEN, CLOSE = "<tool_call>", "</tool_call>"
BEGIN, BETWEEN, END = (OPEN, "\n"), ("\n", CLOSE, "\n", OPEN, "\n"), ("\n", CLOSE)


def read(text: Scanner) -> Steps[None]:
    while (yield from text.content_until(OPEN)):
        if (yield from text.call()) and (yield from text.next_of(CLOSE)):
            text.settle()
