"""Requests that people made: from the rows of a published data set, or from its conversations."""

import random
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

from slipstream.bench.dataset import Sample, normal_lengths
from slipstream.errors import UsageError
from slipstream.text.chat import render_chat
from slipstream.text.tokenizer import Tokenizer

Row = Mapping[str, Any]
_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}


def from_rows(
    rows: Sequence[Row],
    tokenizer: Tokenizer,
    *,
    input_key: str,
    prompt: str = "",
    output_key: str | None = None,
    output_lengths: tuple[float, float] | None = None,
    max_input_len: int | None = None,
    draw: random.Random,
) -> Iterator[Sample]:
    """A request a row: `prompt`, then the text under input_key. The answer is as long as that under output_key, or of
    output_lengths (mean, deviation). Rows whose prompt is longer than max_input_len tokens are left out."""
    for row in rows:
        text = " ".join(filter(None, (prompt, _text(row, input_key, "--dataset_input_key"))))
        if max_input_len is not None and len(tokenizer.encode(text)) > max_input_len:
            continue
        if output_lengths is not None:
            [wanted] = normal_lengths(draw, 1, *output_lengths)
        else:
            answer = _text(row, output_key or "", "--dataset_output_key")
            wanted = len(tokenizer.encode(answer, add_special_tokens=False))
        if text and wanted:
            yield Sample(text, wanted)


def from_conversations(
    rows: Sequence[Row], tokenizer: Tokenizer, count: int | None, max_input_len: int | None
) -> list[Sample]:
    """A request for each answer in a conversation, its prompt all that was said before, in the model's chat template.

    rows: {"conversations": [{"from": "human", "value": …}, …]} as in ShareGPT, or {"messages": [{"role", "content"}]}.
    The first turns of all come first, then the second ones: later requests begin with what the earlier ones held.
    """
    found = islice((each for row in rows for each in _turns(row, tokenizer, max_input_len)), count)
    return [sample for _, sample in sorted(found, key=lambda each: each[0])]


def _turns(row: Row, tokenizer: Tokenizer, max_input_len: int | None) -> Iterator[tuple[int, Sample]]:
    messages = [_message(each) for each in row.get("conversations") or row.get("messages") or ()]
    if not messages:
        raise UsageError('--dataset_name must hold conversations: rows with "conversations" or "messages".')
    for index, message in enumerate(messages):
        if message["role"] != "assistant" or index == 0:
            continue
        token_ids = _prompt(messages[:index], tokenizer)
        wanted = len(tokenizer.encode(message["content"], add_special_tokens=False))
        if max_input_len is not None and len(token_ids) > max_input_len:
            return  # and so are all that follow
        if wanted:
            yield index, Sample(token_ids, wanted)


def _message(entry: Any) -> dict[str, str]:
    role = entry.get("from") or entry.get("role") if isinstance(entry, dict) else None
    content = (entry.get("value") or entry.get("content") or "") if isinstance(entry, dict) else ""
    if role not in _ROLES or not isinstance(content, str):
        raise UsageError(f"A message of --dataset_name is {entry!r:.80}; its role must be one of {', '.join(_ROLES)}.")
    return {"role": _ROLES[role], "content": content}


def _prompt(messages: Sequence[Mapping[str, str]], tokenizer: Tokenizer) -> list[int]:
    if tokenizer.chat_template is None:
        return tokenizer.encode("\n".join(f"{each['role']}: {each['content']}" for each in messages) + "\nassistant:")
    text = render_chat(tokenizer.chat_template, messages, bos_token=tokenizer.bos_token, eos_token=tokenizer.eos_token)
    return tokenizer.encode(text, add_special_tokens=False)


def _text(row: Row, key: str, flag: str) -> str:
    text = row.get(key)
    if not isinstance(text, str):
        raise UsageError(f"{flag} is {key!r}, which is no text of each row; there are {', '.join(map(str, row))}.")
    return text
