"""Bodies of OpenAI's completions and chats; the fields here are all there are.

Those that OpenAI does not have are vLLM's, with its meanings.
"""

from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from slipstream.errors import RequestError
from slipstream.schema.guided import Guided
from slipstream.schema.sampling import SamplingParams
from slipstream.serve.chats import Chat
from slipstream.serve.fields import Fields, NotHere, asked_sampling

_OLD_CALLS = "it is the older form of tools"

# Fields of OpenAI and vLLM that are not here.
NOT_HERE: NotHere = {
    "suffix": ("no text is written to fit before another", ("",)),
    "functions": (_OLD_CALLS, ([],)),
    "function_call": (_OLD_CALLS, ("none", "auto")),
    "refusal": ("models here do not mark their refusals", ()),
    "annotations": ("answers have none", ([],)),
    "structured_outputs": (
        "it has other names here, response_format and guided_json, _regex, _choice and _grammar",
        (),
    ),
    "reasoning_effort": ("how long to think is the chat template's to say (chat_template_kwargs)", ()),
    "modalities": ("answers are text", (["text"],)),
    "audio": ("answers are text", ()),
    "prediction": ("a predicted output is of no use here", ()),
    "store": ("nothing is stored", (False,)),
    "service_tier": ("there is one tier", ("auto", "default")),
}


Prompts = str | list[str] | list[int] | list[list[int]]  # one or several, as text or as token ids


class OpenAIFields(Fields):
    not_here: ClassVar[NotHere] = NOT_HERE


class ModelFields(OpenAIFields):
    model: str | None = None


class StreamOptions(OpenAIFields):
    include_usage: bool = False


class JsonSchema(OpenAIFields):
    name: str = Field(description="the caller's own name of it")
    description: str | None = None
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool | None = Field(None, description="every answer follows its schema, whatever this says")


class ResponseFormat(OpenAIFields):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    def guided(self) -> Guided | None:
        if (self.json_schema is not None) != (self.type == "json_schema"):
            raise RequestError("response_format.json_schema belongs to the type json_schema; give both or neither.")
        if self.json_schema is not None:
            return Guided(json_schema=self.json_schema.schema_)
        return Guided(json_object=True) if self.type == "json_object" else None


class SamplingFields(ModelFields):
    """What completions and chats share. SamplingParams checks the ranges."""

    n: int | None = None
    best_of: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    typical_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    no_repeat_ngram_size: int | None = None
    length_penalty: float | None = None
    early_stopping: bool | None = None
    use_beam_search: bool | None = None
    logit_bias: dict[str, float] | None = Field(None, description="by token id")
    bad_words: list[str] | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    min_tokens: int | None = None
    skip_special_tokens: bool | None = None
    seed: int | None = None
    prompt_logprobs: int | None = None
    response_format: ResponseFormat | None = None
    guided_json: dict[str, Any] | str | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    priority: int = Field(0, description="lower runs first, where the server was started with --queue_policy priority")
    cache_salt: str = Field("", description="cached prompts are shared only within one salt")
    user: str | None = Field(None, description="a note of the caller's own; it changes nothing")

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def num_logprobs(self) -> int | None:
        """How many likeliest tokens are to be shown beside each one; None for no logprobs at all."""
        raise NotImplementedError

    def sampling(self, generation: Mapping[str, Any], max_tokens: int | None) -> SamplingParams:
        if self.stream_options is not None and not self.stream:
            raise RequestError("stream_options means something only with stream; leave it out or stream.")
        if self.stream and self.prompt_logprobs is not None:
            raise RequestError("prompt_logprobs come with a whole answer; leave them or stream out.")
        return asked_sampling(
            generation,
            self.model_dump(include=_SAMPLING, exclude_none=True),
            logit_bias=self.logit_bias,
            max_tokens=max_tokens,
            logprobs=self.num_logprobs,
            guided=self._guided(),
        )

    def _guided(self) -> Guided | None:
        """What the answer must match, by whichever of the fields says it."""
        given = {
            "json_schema": self.guided_json, "regex": self.guided_regex, "choice": self.guided_choice,
            "grammar": self.guided_grammar,
        }  # fmt: skip
        given = {name: value for name, value in given.items() if value is not None}
        wanted = None if self.response_format is None else self.response_format.guided()
        if wanted is not None and given:
            raise RequestError("response_format and the guided_ fields both say what an answer is; give one of them.")
        return Guided(**given) if given else wanted  # type: ignore[arg-type]


_SAMPLING = ({each.name for each in fields(SamplingParams)} & SamplingFields.model_fields.keys()) - {"logit_bias"}


def prompts_of(name: str, given: Prompts) -> list[str | list[int]]:
    """Those of a field of this name, which takes one or several. Raises RequestError for none."""
    if isinstance(given, list) and not all(isinstance(each, int) for each in given):
        return list(given)  # type: ignore[arg-type]
    if not given:
        raise RequestError(f"{name} is empty; give at least one character or token id.")
    return [given]  # type: ignore[list-item]


class CompletionFields(SamplingFields):
    prompt: Prompts
    max_tokens: Annotated[int, Field(ge=0)] | None = Field(16, description="0, with echo, scores the prompt")
    logprobs: int | None = None
    echo: bool = False
    add_special_tokens: bool = True

    @property
    def num_logprobs(self) -> int | None:
        return self.logprobs

    @property
    def is_score(self) -> bool:
        return self.max_tokens == 0

    def params(self, generation: Mapping[str, Any]) -> SamplingParams:
        if self.is_score and not self.echo:
            raise RequestError("max_tokens is 0, which scores a prompt and needs echo; add that, or ask for 1 or more.")
        sampling = self.sampling(generation, 1 if self.is_score else self.max_tokens)
        if not self.echo or self.logprobs is None:
            return sampling
        return replace(sampling, prompt_logprobs=max(self.logprobs, self.prompt_logprobs or 0))


class ContentPart(OpenAIFields):
    type: Literal["text"]
    text: str


class CalledFunction(OpenAIFields):
    name: str
    arguments: str


class ToolCallFields(OpenAIFields):
    id: str
    type: Literal["function"] = "function"
    function: CalledFunction


class MessageFields(OpenAIFields):
    role: str
    content: str | list[ContentPart] | None = None
    name: str | None = None
    tool_calls: list[ToolCallFields] | None = None
    tool_call_id: str | None = Field(None, description="of role tool: the call whose result this is")
    reasoning_content: str | None = Field(None, description="of an earlier answer, for the template to show")

    def for_template(self) -> dict[str, Any]:
        message = self.model_dump(exclude_none=True)
        if isinstance(self.content, list):
            message["content"] = "\n".join(part.text for part in self.content)
        return message


class PromptFields(OpenAIFields):
    """What a chat's prompt is made of, beside its messages."""

    tools: list[dict[str, Any]] | None = None
    add_generation_prompt: bool = Field(True, description="end with the words that start an answer")
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict, description="further names for the template")

    def chat_of(self, messages: Sequence[MessageFields], **more: Any) -> Chat:
        return Chat(
            messages=[message.for_template() for message in messages],
            tools=self.tools,
            template_values=self.chat_template_kwargs,
            add_generation_prompt=self.add_generation_prompt,
            **more,
        )


class ChatFields(SamplingFields, PromptFields):
    messages: list[MessageFields]
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = Field(None, description="false: the answer ends with its first call")
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = Field(None, description="max_tokens by its newer name")
    logprobs: bool | None = None
    top_logprobs: int | None = None

    @property
    def num_logprobs(self) -> int | None:
        if self.top_logprobs is not None and not self.logprobs:
            raise RequestError("top_logprobs means something only with logprobs; set that to true.")
        return (self.top_logprobs or 0) if self.logprobs else None

    def chat(self) -> Chat:
        return self.chat_of(
            self.messages,
            tool_choice="auto" if self.tool_choice is None else self.tool_choice,
            parallel_tool_calls=self.parallel_tool_calls is not False,
            priority=self.priority,
            cache_salt=self.cache_salt,
        )

    def params(self, generation: Mapping[str, Any]) -> SamplingParams:
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            raise RequestError("max_tokens and max_completion_tokens are two names of one limit; give one of them.")
        return self.sampling(generation, self.max_tokens or self.max_completion_tokens)


class TokenizeFields(ModelFields, PromptFields):
    prompt: str | None = None
    messages: list[MessageFields] | None = None
    add_special_tokens: bool | None = Field(None, description="of a prompt; true where it is left out")
    return_token_strs: bool = False


class DetokenizeFields(ModelFields):
    tokens: list[int]
