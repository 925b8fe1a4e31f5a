"""What each field of each protocol does: the tables of test_every_field.py, by endpoint and then by the field's path.

The model is a tiny one that talks nonsense, behind a chat template that shows all it is given (SHOWS_ALL).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Body = Mapping[str, Any]

SHOWS_ALL = (
    "{{ tools | tojson if tools }}{{ extra }}{{ 'and thinks' if enable_thinking }}"
    "{% for m in messages %}{{ m | tojson }}{% endfor %}{% if add_generation_prompt %}:{% endif %}{# <tool_call> #}"
)


@dataclass(frozen=True)
class Effect:
    """The answer to `with_` is another than that to `without`, or is one where `sees` holds, as it does not there."""

    with_: Body  # over the endpoint's plain body, as the next
    without: Body | None = None  # default: nothing
    sees: Callable[[Any], bool] | None = None
    before: Sequence[Body] = ()  # asked first
    tries: int = 1  # of `without`, where chance has a say


@dataclass(frozen=True)
class Note:
    """It changes nothing, and the document says so: both are answered alike."""

    with_: Body
    without: Body | None = None


@dataclass(frozen=True)
class Refused:
    """What of it is refused by name; there is nothing else to be had."""

    with_: Body


@dataclass(frozen=True)
class TimesOut:
    """The answer comes too late, by this."""

    with_: Body


Entry = Effect | Note | Refused | TimesOut

Q = 50  # the token of that letter
SEEDED: Body = {"temperature": 1, "seed": 1}
FORCED: Body = {"logit_bias": {str(Q): 100}}  # the answer is QQQQQQ
ENDS: Body = {"logit_bias": {"1": 100}}  # the answer is the end
BEAMS: Body = {"use_beam_search": True, "n": 2, "best_of": 4, "stop_token_ids": list(range(1, 320, 8))}
SHORT_BEAMS: Body = {**BEAMS, "best_of": 2, "max_tokens": 12, "stop_token_ids": list(range(6, 320, 8))}
LONG = [*range(100, 164)]


def _schema(**more: Any) -> Body:
    return {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"const": 1}, **more}}}


def _cached(answer: Any) -> int:
    return int(answer["usage"]["prompt_tokens_details"]["cached_tokens"])


COUNTED: Body = {"stream": True, "stream_options": {"include_usage": True}}


def _has_usage(events: Any) -> bool:
    return bool(events[-1].get("usage"))


SAMPLING: Mapping[str, Entry] = {
    "model": Refused({"model": "nobody"}),
    "n": Effect({"n": 2, **SEEDED}, SEEDED, lambda answer: len(answer["choices"]) == 2),
    "best_of": Effect({"best_of": 8, **SEEDED}, SEEDED),
    "temperature": Effect(SEEDED, {"seed": 1}),
    "top_p": Effect({"top_p": 1e-9, **SEEDED}, SEEDED),
    "top_k": Effect({"top_k": 1, **SEEDED}, SEEDED),
    "min_p": Effect({"min_p": 1.0, **SEEDED}, SEEDED),
    "typical_p": Effect({"typical_p": 1e-9, **SEEDED}, SEEDED),
    "presence_penalty": Effect({"presence_penalty": -100}),
    "frequency_penalty": Effect({"frequency_penalty": -100}),
    "repetition_penalty": Effect({"repetition_penalty": 0.01}),
    "no_repeat_ngram_size": Effect({"no_repeat_ngram_size": 1, **FORCED}, FORCED),
    "length_penalty": Effect({**BEAMS, "length_penalty": 100}, {**BEAMS, "length_penalty": -100}),
    "early_stopping": Effect({**SHORT_BEAMS, "early_stopping": True}, SHORT_BEAMS),
    "use_beam_search": Effect({**BEAMS}, {"n": 2, "best_of": 4, **SEEDED}),
    "logit_bias": Effect(FORCED),
    "bad_words": Effect({"bad_words": ["Q"], **FORCED}, FORCED),
    "stop": Effect({"stop": "QQ", **FORCED}, FORCED),
    "stop_token_ids": Effect({"stop_token_ids": [Q], **FORCED}, FORCED),
    "include_stop_str_in_output": Effect(
        {"include_stop_str_in_output": True, "stop": "QQ", **FORCED}, {"stop": "QQ", **FORCED}
    ),
    "ignore_eos": Effect({"ignore_eos": True, **ENDS}, ENDS),
    "min_tokens": Effect({"min_tokens": 3, **ENDS}, ENDS),
    "skip_special_tokens": Effect(
        {"skip_special_tokens": False, "logit_bias": {"0": 100}}, {"logit_bias": {"0": 100}}
    ),
    "seed": Effect(SEEDED, {"temperature": 1, "seed": 2}),
    "prompt_logprobs": Effect({"prompt_logprobs": 1}, sees=lambda answer: "prompt_logprobs" in str(answer)),
    "response_format": Effect(_schema()),
    "response_format.type": Effect({"response_format": {"type": "json_object"}}, {"response_format": {"type": "text"}}),
    "response_format.json_schema": Effect(_schema()),
    "response_format.json_schema.name": Note(_schema(name="y"), _schema()),
    "response_format.json_schema.description": Note(_schema(description="y"), _schema()),
    "response_format.json_schema.schema": Effect(_schema(schema={"const": 2}), _schema()),
    "response_format.json_schema.strict": Note(_schema(strict=False), _schema(strict=True)),
    "guided_json": Effect({"guided_json": {"const": 1}}),
    "guided_regex": Effect({"guided_regex": "yes"}),
    "guided_choice": Effect({"guided_choice": ["yes"]}),
    "guided_grammar": Effect({"guided_grammar": 'start: "yes"'}),
    "stream": Effect({"stream": True}, sees=lambda answer: isinstance(answer, list)),
    "stream_options": Effect(COUNTED, {"stream": True}, _has_usage),
    "stream_options.include_usage": Effect(COUNTED, {"stream": True, "stream_options": {}}, _has_usage),
    "priority": Refused({"priority": 1}),  # of a server without --queue_policy priority
    "user": Note({"user": "me"}),
}  # fmt: skip

COMPLETION: Mapping[str, Entry] = {
    **SAMPLING,
    "prompt": Effect({"prompt": "Another"}),
    "max_tokens": Effect({"max_tokens": 3}),
    "logprobs": Effect({"logprobs": 1}, sees=lambda answer: answer["choices"][0]["logprobs"] is not None),
    "echo": Effect({"echo": True}),
    "add_special_tokens": Effect({"add_special_tokens": False}),
    "cache_salt": Effect(
        {"prompt": LONG, "cache_salt": "mine"},
        {"prompt": LONG},
        lambda answer: _cached(answer) == 0,
        [{"prompt": LONG}],
    ),
}

SAID: Body = {"role": "user", "content": "a"}
PARAMETERS: Body = {"type": "object", "properties": {}, "additionalProperties": False}
TOOL: Body = {"type": "function", "function": {"name": "t", "parameters": PARAMETERS}}
CALL: Body = {"id": "c", "type": "function", "function": {"name": "t", "arguments": "{}"}}
NO_BLANKS = {str(token): -50 for token in (1, 222)}  # rather another call than the end


def _message(**fields: Any) -> Body:
    return {"messages": [{**SAID, **fields}]}


def _call(**fields: Any) -> Body:
    return {"messages": [{"role": "assistant", "tool_calls": [{**CALL, **fields}]}]}


def _part(**fields: Any) -> Body:
    return _message(content=[{"type": "text", "text": "a", **fields}])


CHAT_PROMPT: Mapping[str, Entry] = {
    "model": Refused({"model": "nobody"}),
    "tools": Effect({**_message(), "tools": [TOOL]}, _message()),
    "add_generation_prompt": Effect({**_message(), "add_generation_prompt": False}, _message()),
    "chat_template_kwargs": Effect({**_message(), "chat_template_kwargs": {"extra": "b"}}, _message()),
    "messages": Effect(_message(content="Other"), _message()),
    "messages[].role": Effect(_message(role="system"), _message()),
    "messages[].content": Effect(_message(content="Other"), _message()),
    "messages[].content[].type": Refused(_part(type="image_url")),
    "messages[].content[].text": Effect(_part(text="Other"), _part()),
    "messages[].name": Effect(_message(name="me"), _message()),
    "messages[].tool_calls": Effect(_call(), _message()),
    "messages[].tool_calls[].id": Effect(_call(id="other"), _call()),
    "messages[].tool_calls[].type": Refused(_call(type="other")),
    "messages[].tool_calls[].function": Effect(_call(function={"name": "u", "arguments": "{}"}), _call()),
    "messages[].tool_calls[].function.name": Effect(_call(function={"name": "uv", "arguments": "{}"}), _call()),
    "messages[].tool_calls[].function.arguments": Effect(
        _call(function={"name": "t", "arguments": '{"a": 1}'}), _call()
    ),
    "messages[].tool_call_id": Effect(_message(role="tool", tool_call_id="c"), _message(role="tool")),
    "messages[].reasoning_content": Effect(_message(reasoning_content="So."), _message()),
}

MUST_CALL: Body = {"tools": [TOOL], "tool_choice": "required", "max_tokens": 120}

CHAT: Mapping[str, Entry] = {
    **SAMPLING,
    **CHAT_PROMPT,
    "tool_choice": Effect({"tools": [TOOL], "tool_choice": "none"}, {"tools": [TOOL]}),
    "parallel_tool_calls": Effect(
        {**MUST_CALL, "logit_bias": NO_BLANKS, "parallel_tool_calls": False}, {**MUST_CALL, "logit_bias": NO_BLANKS}
    ),
    "max_tokens": Effect({"max_tokens": 3}),
    "max_completion_tokens": Effect({"max_tokens": None, "max_completion_tokens": 3}),
    "logprobs": Effect({"logprobs": True}, sees=lambda answer: answer["choices"][0]["logprobs"] is not None),
    "top_logprobs": Effect({"logprobs": True, "top_logprobs": 2}, {"logprobs": True}),
    "cache_salt": Effect(
        {**_message(content="a" * 64), "cache_salt": "mine"}, _message(content="a" * 64),
        lambda answer: _cached(answer) == 0, [_message(content="a" * 64)],
    ),
}  # fmt: skip

TOKENIZE: Mapping[str, Entry] = {
    **CHAT_PROMPT,
    "prompt": Effect({"prompt": "b"}, {"prompt": "a"}),
    "add_special_tokens": Effect({"prompt": "a", "add_special_tokens": False}, {"prompt": "a"}),
    "return_token_strs": Effect({"prompt": "a", "return_token_strs": True}, {"prompt": "a"}),
}

EMBEDDINGS: Mapping[str, Entry] = {
    "model": Refused({"model": "nobody"}),
    "input": Effect({"input": "Another"}),
    "dimensions": Effect({"dimensions": 8}, sees=lambda answer: len(answer["data"][0]["embedding"]) == 8),
    "encoding_format": Effect({"encoding_format": "base64"}, {"encoding_format": "float"}),
    "pooling": Effect({"pooling": "last"}, {"pooling": "mean"}),
    "truncate_prompt_tokens": Effect({"truncate_prompt_tokens": 3}, {"truncate_prompt_tokens": -1}),
    "add_special_tokens": Effect({"add_special_tokens": False}),
    "priority": Refused({"priority": 1}),
    "cache_salt": Effect(
        {"input": LONG, "pooling": "last", "cache_salt": "my vectors"},
        {"input": LONG, "pooling": "last"},
        lambda answer: _cached(answer) == 0,
        [{"input": LONG, "pooling": "last"}],
    ),
    "user": Note({"user": "me"}),
}

DETOKENIZE: Mapping[str, Entry] = {
    "model": Refused({"model": "nobody", "tokens": []}),
    "tokens": Effect({"tokens": [Q]}, {"tokens": []}),
}

RESPONSE_TOOL: Body = {"type": "function", "name": "t", "parameters": PARAMETERS}
MUST_ANSWER_BY_CALL: Body = {"tools": [RESPONSE_TOOL], "tool_choice": "required", "max_output_tokens": 120}


def _item(**fields: Any) -> Body:
    return {"input": [fields]}


def _said(**fields: Any) -> Body:
    return _item(**{"type": "message", "role": "assistant", **fields})


def _output_text(**fields: Any) -> Body:
    return _said(content=[{"type": "output_text", "text": "a", **fields}])


def _thought(**fields: Any) -> Body:
    return _item(type="reasoning", **fields)


def _function_call(**fields: Any) -> Body:
    return _item(**{"type": "function_call", "call_id": "c", "name": "t", "arguments": "{}", **fields})


def _function_output(**fields: Any) -> Body:
    return _item(**{"type": "function_call_output", "call_id": "c", "output": "a", **fields})


def _text_format(**fields: Any) -> Body:
    return {"text": {"format": {"type": "json_schema", "name": "x", "schema": {"const": 1}, **fields}}}


def _response_tool(**fields: Any) -> Body:
    return {"tools": [{**RESPONSE_TOOL, **fields}]}


RESPONSES: Mapping[str, Entry] = {
    **{name: SAMPLING[name] for name in ("model", "temperature", "top_p", "top_k", "min_p", "seed", "stop")},
    **{name: SAMPLING[name] for name in ("logit_bias", "priority", "user", "stream")},
    "input": Effect({"input": "Other"}),
    "input[].id": Note(_said(content="a", id="m"), _said(content="a")),
    "input[].status": Note(_said(content="a", status="completed"), _said(content="a")),
    "input[].type": Refused(_item(type="computer_call")),
    "input[].role": Effect(_said(content="a", role="user"), _said(content="a")),
    "input[].content": Effect(_said(content="b"), _said(content="a")),
    "input[].content[].type": Refused(_said(content=[{"type": "input_image"}])),
    "input[].content[].text": Effect(_output_text(text="b"), _output_text()),
    "input[].content[].annotations": Note(_output_text(annotations=[]), _output_text()),
    "input[].content[].logprobs": Note(_output_text(logprobs=[]), _output_text()),
    "input[].summary": Effect(_thought(summary=[{"type": "summary_text", "text": "a"}]), _thought()),
    "input[].summary[].type": Refused(_thought(summary=[{"type": "other", "text": "a"}])),
    "input[].summary[].text": Effect(
        _thought(summary=[{"type": "summary_text", "text": "b"}]),
        _thought(summary=[{"type": "summary_text", "text": "a"}]),
    ),
    "input[].call_id": Effect(_function_call(call_id="other"), _function_call()),
    "input[].name": Effect(_function_call(name="uv"), _function_call()),
    "input[].arguments": Effect(_function_call(arguments='{"a": 1}'), _function_call()),
    "input[].output": Effect(_function_output(output="Other"), _function_output()),
    "input[].output[].type": Refused(_function_output(output=[{"type": "input_image", "text": "a"}])),
    "input[].output[].text": Effect(
        _function_output(output=[{"type": "input_text", "text": "Other"}]), _function_output()
    ),
    "instructions": Effect({"instructions": "b"}),
    "max_output_tokens": Effect({"max_output_tokens": 3}),
    "text": Effect(_text_format()),
    "text.format": Effect(_text_format()),
    "text.format.type": Effect({"text": {"format": {"type": "json_object"}}}, {"text": {"format": {"type": "text"}}}),
    "text.format.name": Effect(  # these are given back
        _text_format(name="y"), _text_format()),
    "text.format.description": Effect(_text_format(description="y"), _text_format()),
    "text.format.schema": Effect(_text_format(schema={"const": 2}), _text_format()),
    "text.format.strict": Effect(_text_format(strict=False), _text_format(strict=True)),
    "tools": Effect(_response_tool()),
    "tools[].type": Refused(_response_tool(type="web_search")),
    "tools[].name": Effect(_response_tool(name="other"), _response_tool()),
    "tools[].description": Effect(_response_tool(description="b"), _response_tool()),
    "tools[].parameters": Effect(_response_tool(parameters={}), _response_tool()),
    "tools[].strict": Effect(_response_tool(strict=True), _response_tool()),  # test_openai_tools.py has calls
    "tool_choice": Effect({**_response_tool(), "tool_choice": "none"}, _response_tool()),
    "parallel_tool_calls": Effect(
        {**MUST_ANSWER_BY_CALL, "logit_bias": NO_BLANKS, "parallel_tool_calls": False},
        {**MUST_ANSWER_BY_CALL, "logit_bias": NO_BLANKS},
    ),
    "stream_options": Refused({"stream_options": {"stream_options": 1}}),  # whatever it holds
    "metadata": Effect({"metadata": {"a": "b"}}),
    "user": Effect({"user": "me"}),  # it is given back
    "safety_identifier": Note({"safety_identifier": "me"}),
    "prompt_cache_key": Note({"prompt_cache_key": "me"}),
    "chat_template_kwargs": Effect({"chat_template_kwargs": {"extra": "b"}}),
    "cache_salt": Effect(
        {"input": "a" * 64, "cache_salt": "theirs"}, {"input": "a" * 64},
        lambda answer: answer["usage"]["input_tokens_details"]["cached_tokens"] == 0, [{"input": "a" * 64}],
    ),
}  # fmt: skip

ONE: Body = {"output_config": {"format": {"type": "json_schema", "schema": {"const": 1}}}}
CACHED: Body = {"type": "ephemeral"}
CUSTOM: Body = {"name": "t", "input_schema": PARAMETERS}


def _block(**fields: Any) -> Body:
    return {"messages": [{"role": "user", "content": [{"type": "text", "text": "a", **fields}]}]}


def _answered(**block: Any) -> Body:
    return {"messages": [{"role": "assistant", "content": [block]}, SAID]}


def _use(**fields: Any) -> Body:
    return _answered(**{"type": "tool_use", "id": "c", "name": "t", "input": {}, **fields})


def _result(**fields: Any) -> Body:
    return {"messages": [{"role": "user", "content": [{"type": "tool_result", "tool_use_id": "c", **fields}]}]}


def _in_result(**fields: Any) -> Body:
    return _result(content=[{"type": "text", "text": "a", **fields}])


def _system(**fields: Any) -> Body:
    return {"system": [{"type": "text", "text": "a", **fields}]}


def _custom(**fields: Any) -> Body:
    return {"tools": [{**CUSTOM, **fields}]}


def _is_cache_control(path: str, cached: Body, ttl: Body, other: Body, plain: Body | None = None) -> dict[str, Entry]:
    return {
        f"{path}cache_control": Note(cached, plain),
        f"{path}cache_control.type": Refused(other),
        f"{path}cache_control.ttl": Note(ttl, plain),
    }


TTL: Body = {"type": "ephemeral", "ttl": "5m"}
OTHER: Body = {"type": "other"}

COUNT: Mapping[str, Entry] = {
    **_is_cache_control("", {"cache_control": CACHED}, {"cache_control": TTL}, {"cache_control": OTHER}),
    **_is_cache_control(
        "system[].", _system(cache_control=CACHED), _system(cache_control=TTL), _system(cache_control=OTHER), _system()
    ),
    **_is_cache_control(
        "messages[].content[].", _block(cache_control=CACHED), _block(cache_control=TTL), _block(cache_control=OTHER),
        _block(),
    ),
    **_is_cache_control(
        "messages[].content[].content[].", _in_result(cache_control=CACHED), _in_result(cache_control=TTL),
        _in_result(cache_control=OTHER), _in_result(),
    ),
    **_is_cache_control(
        "tools[].", _custom(cache_control=CACHED), _custom(cache_control=TTL), _custom(cache_control=OTHER), _custom()
    ),
    "model": Refused({"model": "nobody"}),
    "system": Effect({"system": "b"}),
    "system[].type": Refused(_system(type="image")),
    "system[].text": Effect(_system(text="Other"), _system()),
    "messages": Effect(_message(content="Other"), _message()),
    "messages[].role": Effect(_message(role="system"), _message()),
    "messages[].content": Effect(_message(content="Other"), _message()),
    "messages[].content[].type": Refused(_block(type="image")),
    "messages[].content[].text": Effect(_block(text="Other"), _block()),
    "messages[].content[].thinking": Effect(
        _answered(type="thinking", thinking="Other"), _answered(type="thinking", thinking="a")
    ),
    "messages[].content[].signature": Note(
        _answered(type="thinking", thinking="a", signature="b"), _answered(type="thinking", thinking="a")
    ),
    "messages[].content[].id": Effect(_use(id="other"), _use()),
    "messages[].content[].name": Effect(_use(name="other"), _use()),
    "messages[].content[].input": Effect(_use(input={"a": 1}), _use()),
    "messages[].content[].tool_use_id": Effect(_result(tool_use_id="other"), _result()),
    "messages[].content[].content": Effect(_result(content="Other"), _result()),
    "messages[].content[].content[].type": Refused(_in_result(type="image")),
    "messages[].content[].content[].text": Effect(_in_result(text="Other"), _in_result()),
    "messages[].content[].is_error": Effect(_result(is_error=True), _result()),
    "tools": Effect(_custom()),
    "tools[].type": Refused(_custom(type="bash_20250124")),
    "tools[].name": Effect(_custom(name="other"), _custom()),
    "tools[].description": Effect(_custom(description="b"), _custom()),
    "tools[].input_schema": Effect(_custom(input_schema={"type": "object"}), _custom()),
    "tool_choice": Effect({**_custom(), "tool_choice": {"type": "none"}}, _custom()),
    "tool_choice.type": Effect(
        {**_custom(), "tool_choice": {"type": "none"}}, {**_custom(), "tool_choice": {"type": "auto"}}
    ),
    "tool_choice.name": Refused({**_custom(), "tool_choice": {"type": "tool", "name": "nobody"}}),
    "tool_choice.disable_parallel_tool_use": Note(  # of a count
        {**_custom(), "tool_choice": {"type": "any", "disable_parallel_tool_use": True}}, _custom()
    ),
    "thinking": Effect({"thinking": {"type": "adaptive"}}),
    "thinking.type": Effect({"thinking": {"type": "enabled"}}, {"thinking": {"type": "disabled"}}),
    "output_config": Note(ONE),  # these, too
    "output_config.format": Note(ONE),
    "output_config.format.type": Refused({"output_config": {"format": {"type": "other", "schema": {"const": 1}}}}),
    "output_config.format.schema": Note(ONE),
}  # fmt: skip

MANY_CALLS: Body = {**_custom(), "max_tokens": 150, "temperature": 5.0}

MESSAGES: Mapping[str, Entry] = {
    **COUNT,
    **{name: SAMPLING[name] for name in ("stream",)},
    "tool_choice.disable_parallel_tool_use": Effect(
        {**MANY_CALLS, "tool_choice": {"type": "any", "disable_parallel_tool_use": True}},
        {**MANY_CALLS, "tool_choice": {"type": "any"}},
        lambda answer: len(answer["content"]) == 1,
        tries=20,  # it calls once more as often as not
    ),
    "output_config": Effect(ONE),
    "output_config.format": Effect(ONE),
    "output_config.format.schema": Effect(ONE),
    "max_tokens": Effect({"max_tokens": 3}),
    "stop_sequences": Effect({"stop_sequences": [*"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ 0123456789"]}),
    "temperature": Effect({"temperature": 1.0}, {"temperature": 0.0}),
    "top_p": Effect({"temperature": 1, "top_p": 1e-9}, {"temperature": 1}),
    "top_k": Effect({"temperature": 1, "top_k": 1}, {"temperature": 1}),
    "metadata": Note({"metadata": {"user_id": "me"}}),
    "metadata.user_id": Note({"metadata": {"user_id": "me"}}),
}  # fmt: skip


def _with(**parameters: Any) -> Body:
    return {"parameters": {"max_new_tokens": 6, **parameters}}


DRAWN: Body = {"do_sample": True, "seed": 1}
TWO_QS: Body = {"type": "regex", "value": "QQ"}

TGI: Mapping[str, Entry] = {
    "inputs": Effect({"inputs": "Another"}),
    "parameters": Effect(_with(max_new_tokens=3), _with()),
    "parameters.details": Effect(_with(details=True), _with()),
    "parameters.do_sample": Effect(_with(**DRAWN), _with(seed=1)),
    "parameters.frequency_penalty": Effect(_with(frequency_penalty=-100), _with()),
    "parameters.grammar": Effect(_with(grammar={"type": "regex", "value": "yes"}), _with()),
    "parameters.grammar.type": Effect(
        _with(grammar={"type": "json_schema", "value": {"schema": {"const": 1}}}),
        _with(grammar={"type": "json", "value": {"schema": {"const": 1}}}),
    ),
    "parameters.grammar.value": Effect(
        _with(grammar={"type": "regex", "value": "yes"}), _with(grammar={"type": "regex", "value": "no"})
    ),
    "parameters.max_new_tokens": Effect(_with(max_new_tokens=3), _with()),
    "parameters.repetition_penalty": Effect(_with(repetition_penalty=0.01), _with()),
    "parameters.return_full_text": Effect(_with(return_full_text=True), _with()),
    "parameters.seed": Effect(_with(**DRAWN), _with(do_sample=True, seed=2)),
    "parameters.stop": Effect(_with(stop=["Q"], grammar=TWO_QS), _with(grammar=TWO_QS)),
    "parameters.stop_sequences": Effect(_with(stop_sequences=["Q"], grammar=TWO_QS), _with(grammar=TWO_QS)),
    "parameters.temperature": Effect(_with(temperature=2.0, **DRAWN), _with(**DRAWN)),
    "parameters.top_k": Effect(_with(top_k=1, **DRAWN), _with(**DRAWN)),
    "parameters.top_p": Effect(_with(top_p=1e-6, **DRAWN), _with(**DRAWN)),
    "parameters.typical_p": Effect(_with(typical_p=1e-6, **DRAWN), _with(**DRAWN)),
    "parameters.top_n_tokens": Effect(_with(top_n_tokens=2, details=True), _with(details=True)),
    "parameters.truncate": Effect(_with(truncate=2), _with()),
    "parameters.best_of": Effect(
        _with(best_of=2, do_sample=True, details=True),
        _with(details=True),
        lambda answer: "best_of_sequences" in str(answer),
    ),
    "parameters.decoder_input_details": Effect(_with(decoder_input_details=True), _with()),
    "stream": Note({"stream": True}),
}  # fmt: skip

TGI_ROOT: Mapping[str, Entry] = {
    **TGI,
    "stream": Effect({"stream": True}, sees=lambda answer: "index" in str(answer)),
}
TGI_STREAM: Mapping[str, Entry] = {
    **TGI,
    "parameters.best_of": Refused(_with(best_of=2, do_sample=True)),
    "parameters.decoder_input_details": Refused(_with(decoder_input_details=True)),
    "parameters.top_n_tokens": Effect(_with(top_n_tokens=2), _with()),
}

ALL_DRAWN: Body = {"top_p": 1.0, "random_seed": 1}  # TensorRT-LLM samples where it is given a filter

BIASED: Body = {"embedding_bias_words": ["Q"], "embedding_bias_weights": [100.0]}

GENERATE: Mapping[str, Entry] = {
    "text_input": Effect({"text_input": "Another"}),
    "max_tokens": Effect({"max_tokens": 3}),
    "bad_words": Effect({"bad_words": ["Q"], **BIASED}, BIASED),
    "stop_words": Effect({"stop_words": ["QQ"], **BIASED}, BIASED),
    "end_id": Effect({"end_id": Q, **BIASED}, BIASED),
    "pad_id": Note({"pad_id": 0}),
    "top_k": Effect({"top_k": 50, "random_seed": 1}, {"random_seed": 1}),
    "top_p": Effect(ALL_DRAWN, {"random_seed": 1}),
    "temperature": Effect({**ALL_DRAWN, "temperature": 50.0}, ALL_DRAWN),
    "length_penalty": Effect(
        {"beam_width": 3, "end_id": 26, "length_penalty": 100.0},
        {"beam_width": 3, "end_id": 26, "length_penalty": -100.0},
    ),
    "repetition_penalty": Effect({"repetition_penalty": 0.01}),
    "min_length": Effect({"min_length": 3, "end_id": Q, **BIASED}, {"end_id": Q, **BIASED}),
    "presence_penalty": Effect({"presence_penalty": -100.0}),
    "frequency_penalty": Effect({"frequency_penalty": -100.0}),
    "random_seed": Effect(ALL_DRAWN, {"top_p": 1.0, "random_seed": 2}),
    "return_log_probs": Effect({"return_log_probs": True}),
    "return_context_logits": Refused({"return_context_logits": True}),
    "return_generation_logits": Refused({"return_generation_logits": True}),
    "beam_width": Effect({"beam_width": 2}),
    "stream": Refused({"stream": True}),
    "prompt_embedding_table": Refused({"prompt_embedding_table": [1.0]}),
    "prompt_vocab_size": Refused({"prompt_vocab_size": 1}),
    "embedding_bias_words": Effect(BIASED),
    "embedding_bias_weights": Effect(BIASED, {"embedding_bias_words": ["Q"], "embedding_bias_weights": [0]}),
    "id": Effect({"id": "mine"}, sees=lambda answer: "mine" in str(answer)),
    "priority": Refused({"priority": 1}),
    "timeout": TimesOut({"timeout": 1}),  # microseconds
    "sequence_id": Refused({"sequence_id": 1}),
    "sequence_start": Refused({"sequence_start": True}),
    "sequence_end": Refused({"sequence_end": True}),
    "triton_enable_empty_final_response": Note({"triton_enable_empty_final_response": True}),
    "parameters": Effect({"parameters": {"presence_penalty": -100.0}}),
}
GENERATE_STREAM: Mapping[str, Entry] = {
    **GENERATE,
    "stream": Effect({"stream": True, "max_tokens": 200}, {"max_tokens": 200}, lambda events: len(events) > 1),
}

TEXT: Body = {"name": "text_input", "shape": [1, 1], "datatype": "BYTES", "data": ["The capital"]}
SIX: Body = {"name": "max_tokens", "shape": [1, 1], "datatype": "INT32", "data": [6]}
THREE: Body = {**SIX, "data": [3]}


def _output(**fields: Any) -> Body:
    return {"outputs": [{"name": "text_output", **fields}]}


INFER: Mapping[str, Entry] = {
    "id": Effect({"id": "mine"}, sees=lambda answer: "mine" in str(answer)),
    "parameters": Effect({"parameters": {"binary_data_output": True}}),
    "inputs": Effect({"inputs": [TEXT, THREE]}),
    "inputs[].name": Refused({"inputs": [{**TEXT, "name": "name"}]}),
    "inputs[].shape": Refused({"inputs": [{**TEXT, "shape": [2]}, SIX]}),
    "inputs[].datatype": Refused({"inputs": [{**TEXT, "datatype": "TEXT"}, SIX]}),
    "inputs[].parameters": Refused({"inputs": [{**TEXT, "parameters": {"parameters": 1}}, SIX]}),
    "inputs[].parameters.binary_data_size": Refused(
        {"inputs": [{**TEXT, "data": None, "parameters": {"binary_data_size": 9}}, SIX]}
    ),
    "inputs[].data": Effect({"inputs": [{**TEXT, "data": ["Another"]}, SIX]}),
    "outputs": Refused({"outputs": [{"name": "outputs"}]}),
    "outputs[].name": Refused({"outputs": [{"name": "name"}]}),
    "outputs[].parameters": Effect(_output(parameters={"binary_data": True})),
    "outputs[].parameters.binary_data": Effect(_output(parameters={"binary_data": True})),
}  # fmt: skip


@dataclass(frozen=True)
class Endpoint:
    plain: Body
    table: Mapping[str, Entry]


CHAT_BODY: Body = {"messages": [SAID], "max_tokens": 6, "temperature": 0}
GENERATE_BODY: Body = {"text_input": "The capital", "max_tokens": 6}

ENDPOINTS: Mapping[str, Endpoint] = {
    "/v1/completions": Endpoint({"prompt": "The capital", "max_tokens": 6, "temperature": 0}, COMPLETION),
    "/v1/chat/completions": Endpoint(CHAT_BODY, CHAT),
    "/v1/responses": Endpoint({"input": "a", "max_output_tokens": 6, "temperature": 0}, RESPONSES),
    "/v1/messages": Endpoint(CHAT_BODY, MESSAGES),
    "/v1/messages/count_tokens": Endpoint({"messages": [SAID]}, COUNT),
    "/v1/embeddings": Endpoint({"input": "The capital"}, EMBEDDINGS),
    "/tokenize": Endpoint({}, TOKENIZE),
    "/detokenize": Endpoint({}, DETOKENIZE),
    "/": Endpoint({"inputs": "The capital", **_with()}, TGI_ROOT),
    "/generate": Endpoint({"inputs": "The capital", **_with()}, TGI),
    "/generate_stream": Endpoint({"inputs": "The capital", **_with()}, TGI_STREAM),
    "/v2/models/{name}/infer": Endpoint({"inputs": [TEXT, SIX]}, INFER),
    "/v2/models/{name}/generate": Endpoint(GENERATE_BODY, GENERATE),
    "/v2/models/{name}/generate_stream": Endpoint(GENERATE_BODY, GENERATE_STREAM),
}
