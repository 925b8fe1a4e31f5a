"""DeepSeek-R1, QwQ, Qwen 3: <think>…</think> before the answer; the prompt may end with the opening tag."""

import re

from slipstream.text.tools.scanner import Scanner, Steps

OPEN, CLOSE = "<think>", "</think>"

_NEWLINES = re.compile(r"\n*")


def read(text: Scanner, in_prompt: bool) -> Steps[None]:
    """in_prompt: the prompt ends with the opening tag.  Newlines beside the tags belong to them, as in templates."""
    if in_prompt or (yield from text.next_of(OPEN)):
        yield from text.read_while(_NEWLINES)
        text.settle()
        yield from text.reasoning_until(CLOSE)
        yield from text.read_while(_NEWLINES)
        text.settle()
    yield from text.content_until()


def is_begun_by(prompt: str) -> bool:
    """Whether the prompt (its end is enough) has opened the reasoning that the answer goes on with."""
    return prompt.rstrip().endswith(OPEN)
