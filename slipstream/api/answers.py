"""AnswerReader: what chat() adds to generate(): tools go in, calls and reasoning come out."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from slipstream.api.outputs import CompletionOutput, RequestOutput
from slipstream.errors import RequestError
from slipstream.schema.guided import Guided
from slipstream.schema.sampling import SamplingParams
from slipstream.text.tokenizer import Tokenizer
from slipstream.text.tools import (
    FORMATS,
    AnswerFormat,
    AnswerParser,
    any_is_strict,
    check_choice,
    check_tools,
    is_begun_by,
    lazy_schema_of,
    schema_of,
)

_NUM_END_TOKENS = 16  # of the prompt: enough to see whether it ends with the tag that opens reasoning


class AnswerReader:
    """Reads the answers to one conversation."""

    def __init__(
        self,
        form: AnswerFormat,
        tools: Sequence[Mapping[str, Any]] | None,
        tool_choice: Any,
        *,
        parallel: bool = True,
    ) -> None:
        """parallel: an answer may have several calls."""
        check_choice(tools, tool_choice)
        self.tools = None if tool_choice == "none" else tools  # those that the prompt shows
        self._form, self._choice, self._parallel = form, tool_choice, parallel
        self._names = () if self.tools is None and tool_choice != "required" else tuple(check_tools(self.tools))
        if self._names and self._form.calls is None:
            raise RequestError(
                f"tools has no effect: the model's chat template shows no calls as {', '.join(FORMATS)} write them; "
                "leave tools out, or give LLM(…, chat_template=…) one that does."
            )
        self._reasoning_in_prompt = False

    def sampling(self, given: SamplingParams, prompt: Sequence[int], tokenizer: Tokenizer) -> SamplingParams:
        """What to ask for so that the text can be read, as some markers are special tokens, and that a call comes."""
        end = tokenizer.decode(prompt[-_NUM_END_TOKENS:], skip_special_tokens=False)
        self._reasoning_in_prompt = is_begun_by(end) and given.guided is None  # whose answer begins at once
        if self._names and given.guided is not None:
            raise RequestError(
                "tools and a grammar of the answer (guided, response_format) both say what it must be; "
                "leave one out, or set tool_choice to none."
            )
        if self._choice not in ("auto", "none") or (self._choice == "auto" and any_is_strict(self.tools)):
            given = replace(given, guided=self._guided(tokenizer))
        return replace(given, skip_special_tokens=False) if self._names or self._form.reasons else given

    def parser(self) -> AnswerParser:
        """For one answer, as it streams."""
        return AnswerParser(
            self._form,
            reasoning_in_prompt=self._reasoning_in_prompt,
            names=self._names,
            parallel=self._parallel,
        )

    def read(self, output: RequestOutput) -> RequestOutput:
        return replace(output, outputs=[self._read_one(completion) for completion in output.outputs])

    def _guided(self, tokenizer: Tokenizer) -> Guided:
        assert self._form.calls is not None
        more: dict[str, Any] = {
            "parallel": self._parallel,
            "reasons": self._form.reasons,
            "reasoning_in_prompt": self._reasoning_in_prompt,
            "special_ids": {tokenizer.token(token_id): token_id for token_id in tokenizer.special_ids},
        }
        if self._choice == "auto":
            grammar = lazy_schema_of(self.tools or (), self._form.calls, **more)
        else:
            grammar = schema_of(self.tools, self._choice, self._form.calls, **more)
        return Guided(grammar=grammar)

    def _read_one(self, completion: CompletionOutput) -> CompletionOutput:
        answer = self.parser().read(completion.text)
        return replace(
            completion, content=answer.content, reasoning=answer.reasoning or None, tool_calls=answer.tool_calls
        )
