"""What OpenAI's protocol says of outputs: as a whole, or in chunks as they grow."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar
from uuid import uuid4

from slipstream.api.answers import AnswerReader
from slipstream.api.outputs import CompletionOutput, RequestOutput
from slipstream.schema.request import FinishReason, TokenLogprobs
from slipstream.serve.openai.fields import ChatFields, CompletionFields, SamplingFields
from slipstream.text import tools
from slipstream.text.tokenizer import Tokenizer

Body = TypeVar("Body", bound=SamplingFields)


@dataclass
class _Choice:
    """What of a choice has gone out."""

    num_tokens: int = 0
    num_characters: int = 0  # of the tokens whose logprobs have
    has_called: bool = False
    has_started: bool = False
    has_ended: bool = False


@dataclass(frozen=True)
class _Piece:
    """Some of a choice: all of it, or what is new."""

    output: RequestOutput
    deltas: Sequence[tools.Delta]
    logprobs: Sequence[TokenLogprobs]
    is_first: bool


class Answer(Generic[Body]):
    """One call's answer. Tell it each output (note), then ask for what to send: whole() once, or chunks() each time."""

    object_name: str
    chunk_name: str
    id_prefix: str

    def __init__(self, body: Body, tokenizer: Tokenizer | None, model: str) -> None:
        self.body, self._tokenizer = body, tokenizer
        self._head = {"id": f"{self.id_prefix}-{uuid4().hex}", "created": int(time.time()), "model": model}
        self._outputs: dict[int, RequestOutput] = {}  # by prompt
        self._choices: dict[int, _Choice] = {}

    def note(self, prompt_index: int, output: RequestOutput) -> None:
        self._outputs[prompt_index] = output

    def whole(self) -> dict[str, Any]:
        choices = []
        for prompt_index, output in sorted(self._outputs.items()):
            for completion in output.outputs:
                index, choice = _index(prompt_index, output, completion), _Choice()
                deltas = self._read(index, completion.text, is_last=True)
                piece = _Piece(output, deltas, completion.logprobs or (), is_first=True)
                shown = self._choice(piece, choice, is_chunk=False)
                choices.append({"index": index, **shown, **_ending(choice, completion)})
        return {**self._head, "object": self.object_name, "choices": choices, **self._more(), "usage": self._usage()}

    def chunks(self, prompt_index: int) -> Iterator[dict[str, Any]]:
        """What is new of this prompt's completions since the last time."""
        output = self._outputs[prompt_index]
        for completion in output.outputs:
            index = _index(prompt_index, output, completion)
            choice = self._choices.setdefault(index, _Choice())
            if choice.has_ended:
                continue
            choice.has_ended = completion.finish_reason is not None
            deltas = self._read(index, completion.text_diff, is_last=choice.has_ended)
            logprobs = (completion.logprobs or ())[choice.num_tokens :]
            if choice.has_started and not (deltas or logprobs or choice.has_ended):
                continue
            piece = _Piece(output, deltas, logprobs, is_first=not choice.has_started)
            shown = self._choice(piece, choice, is_chunk=True)
            choice.has_started, choice.num_tokens = True, len(completion.token_ids)
            yield self._chunk([{"index": index, **shown, **_ending(choice, completion)}])

    def usage_chunk(self) -> dict[str, Any]:
        return self._chunk([]) | {"usage": self._usage()}

    def _read(self, index: int, text: str, *, is_last: bool) -> Sequence[tools.Delta]:
        """What the text, which is new, adds to the choice."""
        return [tools.Content(text)] if text else []

    def _choice(self, piece: _Piece, choice: _Choice, *, is_chunk: bool) -> dict[str, Any]:
        raise NotImplementedError

    def _more(self) -> dict[str, Any]:
        """Beside the choices of a whole answer."""
        return {}

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        chunk = {**self._head, "object": self.chunk_name, "choices": choices}
        return chunk | {"usage": None} if self.body.include_usage else chunk

    def _usage(self) -> dict[str, Any]:
        outputs = self._outputs.values()
        num_prompt = sum(len(output.prompt_token_ids) for output in outputs)
        num_output = sum(len(completion.token_ids) for output in outputs for completion in output.outputs)
        return {
            "prompt_tokens": num_prompt,
            "completion_tokens": num_output,
            "total_tokens": num_prompt + num_output,
            "prompt_tokens_details": {"cached_tokens": sum(output.num_cached_tokens for output in outputs)},
        }

    def _bytes(self, token_id: int) -> bytes:
        return b"" if self._tokenizer is None else self._tokenizer.token_bytes(token_id)

    def _text(self, token_id: int) -> str:
        return self._bytes(token_id).decode("utf-8", "replace")

    def _prompt_logprobs(self, output: RequestOutput) -> list[dict[str, Any] | None] | None:
        """vLLM's form: for each prompt token its own and the likeliest ones, by id."""
        if output.prompt_logprobs is None or self.body.prompt_logprobs is None:
            return None
        return [None if entry is None else self._by_id(entry) for entry in output.prompt_logprobs]

    def _by_id(self, entry: TokenLogprobs) -> dict[str, Any]:
        ranked = [(token_id, logprob, rank) for rank, (token_id, logprob) in enumerate(entry.top, 1)]
        return {
            str(token_id): {"logprob": logprob, "rank": rank, "decoded_token": self._text(token_id)}
            for token_id, logprob, rank in [(entry.token_id, entry.logprob, entry.rank), *ranked]
        }


class CompletionAnswer(Answer[CompletionFields]):
    object_name = chunk_name = "text_completion"
    id_prefix = "cmpl"

    def note(self, prompt_index: int, output: RequestOutput) -> None:
        if self.body.is_score:  # one token was generated, since none cannot be; it was not asked for
            nothing = [
                replace(each, text="", text_diff="", token_ids=[], logprobs=each.logprobs and [])
                for each in output.outputs
            ]
            output = replace(output, outputs=nothing)
        super().note(prompt_index, output)

    def _choice(self, piece: _Piece, choice: _Choice, *, is_chunk: bool) -> dict[str, Any]:
        has_prompt = piece.is_first and self.body.echo
        text = tools.Answer.of(piece.deltas).content
        shown: dict[str, Any] = {"text": self._prompt_text(piece.output) + text if has_prompt else text}
        shown["logprobs"] = None
        if self.body.logprobs is not None:
            entries: list[tuple[int, TokenLogprobs | None]] = []
            if has_prompt:
                entries += zip(piece.output.prompt_token_ids, piece.output.prompt_logprobs or (), strict=True)
            entries += [(entry.token_id, entry) for entry in piece.logprobs]
            shown["logprobs"] = self._columns(entries, choice)
        if not is_chunk and (prompt_logprobs := self._prompt_logprobs(piece.output)) is not None:
            shown["prompt_logprobs"] = prompt_logprobs
        return shown

    def _prompt_text(self, output: RequestOutput) -> str:
        if output.prompt is not None:
            return output.prompt
        if self._tokenizer is None:
            return ""
        return self._tokenizer.decode(output.prompt_token_ids, skip_special_tokens=False)

    def _columns(self, entries: Sequence[tuple[int, TokenLogprobs | None]], choice: _Choice) -> dict[str, Any]:
        tokens = [self._text(token_id) for token_id, _ in entries]
        offsets = []
        for token in tokens:
            offsets.append(choice.num_characters)
            choice.num_characters += len(token)
        return {
            "tokens": tokens,
            "token_logprobs": [None if entry is None else entry.logprob for _, entry in entries],
            "top_logprobs": [None if entry is None else self._top(entry) for _, entry in entries],
            "text_offset": offsets,
        }

    def _top(self, entry: TokenLogprobs) -> dict[str, float]:
        return {self._text(token_id): logprob for token_id, logprob in entry.top} | {
            self._text(entry.token_id): entry.logprob
        }


class ChatAnswer(Answer[ChatFields]):
    object_name, chunk_name = "chat.completion", "chat.completion.chunk"
    id_prefix = "chatcmpl"

    def __init__(self, body: ChatFields, tokenizer: Tokenizer, model: str, reader: AnswerReader) -> None:
        super().__init__(body, tokenizer, model)
        self._reader = reader
        self._parsers: dict[int, tools.AnswerParser] = {}  # by choice

    def _read(self, index: int, text: str, *, is_last: bool) -> Sequence[tools.Delta]:
        if index not in self._parsers:
            self._parsers[index] = self._reader.parser()
        deltas = self._parsers[index].push(text)
        return deltas + self._parsers[index].finish() if is_last else deltas

    def _choice(self, piece: _Piece, choice: _Choice, *, is_chunk: bool) -> dict[str, Any]:
        choice.has_called |= any(isinstance(delta, tools.CallEnd) for delta in piece.deltas)
        message = {"role": "assistant"} if piece.is_first else {}
        message |= _delta(piece) if is_chunk else _message(piece)
        logprobs = None
        if self.body.logprobs:
            logprobs = {"content": [self._entry(entry) for entry in piece.logprobs], "refusal": None}
        return {"delta" if is_chunk else "message": message, "logprobs": logprobs}

    def _more(self) -> dict[str, Any]:
        prompt_logprobs = self._prompt_logprobs(self._outputs[0])
        return {} if prompt_logprobs is None else {"prompt_logprobs": prompt_logprobs}

    def _entry(self, entry: TokenLogprobs) -> dict[str, Any]:
        shown = self._token(entry.token_id, entry.logprob)
        return shown | {"top_logprobs": [self._token(token_id, logprob) for token_id, logprob in entry.top]}

    def _token(self, token_id: int, logprob: float) -> dict[str, Any]:
        return {"token": self._text(token_id), "logprob": logprob, "bytes": list(self._bytes(token_id))}


def _index(prompt_index: int, output: RequestOutput, completion: CompletionOutput) -> int:
    return prompt_index * len(output.outputs) + completion.index


def _ending(choice: _Choice, completion: CompletionOutput) -> dict[str, Any]:
    reason = completion.finish_reason
    if reason == FinishReason.STOP and choice.has_called:
        reason = "tool_calls"
    return {"finish_reason": reason, "stop_reason": completion.stop_reason}


def _message(piece: _Piece) -> dict[str, Any]:
    """A whole answer."""
    answer = tools.Answer.of(piece.deltas)
    message: dict[str, Any] = {"content": answer.content, "refusal": None}
    if answer.reasoning:
        message["reasoning_content"] = answer.reasoning
    if answer.tool_calls:
        message["content"] = answer.content or None
        message["tool_calls"] = [
            {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
            for call in answer.tool_calls
        ]
    return message


def _delta(piece: _Piece) -> dict[str, Any]:
    """What is new of one. A call is shown from its name on, so one that breaks off has been shown, too."""
    content = reasoning = ""
    calls: dict[int, dict[str, Any]] = {}
    for delta in piece.deltas:
        match delta:
            case tools.Content(text):
                content += text
            case tools.Reasoning(text):
                reasoning += text
            case tools.CallStart(index, call_id, name):
                calls[index] = {
                    "index": index, "id": call_id, "type": "function", "function": {"name": name, "arguments": ""},
                }  # fmt: skip
            case tools.CallArguments(index, text):
                call = calls.setdefault(index, {"index": index, "function": {"arguments": ""}})
                call["function"]["arguments"] += text
    shown: dict[str, Any] = {}
    if content or piece.is_first:
        shown["content"] = content
    if reasoning:
        shown["reasoning_content"] = reasoning
    if calls:
        shown["tool_calls"] = list(calls.values())
    return shown
