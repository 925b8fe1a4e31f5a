"""Bodies of OpenAI's responses. What would need a memory of earlier responses is refused: give their items in input."""

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Discriminator, Field, Tag

from slipstream.errors import RequestError
from slipstream.schema.guided import Guided
from slipstream.schema.sampling import SamplingParams
from slipstream.serve.chats import Chat
from slipstream.serve.fields import Fields, NotHere, asked_sampling

_NO_MEMORY = "nothing is stored; give the earlier items in input"
_NO_LOGPROBS = "logprobs are in /v1/chat/completions"

NOT_HERE: NotHere = {
    "store": ("nothing is stored", (False,)),
    "previous_response_id": (_NO_MEMORY, ()),
    "conversation": (_NO_MEMORY, ()),
    "prompt": ("no prompts are stored", ()),
    "background": ("an answer is given while the client waits", (False,)),
    "include": (f"there is nothing more to be had, and {_NO_LOGPROBS}", ([],)),
    "top_logprobs": (_NO_LOGPROBS, (0,)),
    "max_tool_calls": ("it counts calls that a server runs, and none are run here", ()),
    "reasoning": ("how long to think is the chat template's to say (chat_template_kwargs)", ({},)),
    "truncation": ("a prompt that is too long is refused and not cut", ("disabled",)),
    "verbosity": ("how much to write is the prompt's to say", ("medium",)),
    "service_tier": ("there is one tier", ("auto", "default")),
    "prompt_cache_retention": ("cached prompts stay while there is room", ()),
    "context_management": ("a conversation is not shortened here", ([],)),
    "moderation": ("there is none", ()),
    "include_obfuscation": ("nothing is padded", (False,)),
    "phase": ("answers have one phase", ()),
    "caller": ("calls are the model's own", ()),
    "namespace": ("tools have no namespaces", ()),
    "async": ("calls are waited for", (False,)),
    "encrypted_content": ("reasoning is plain text", ()),
}


class ResponseFields(Fields):
    not_here: ClassVar[NotHere] = NOT_HERE


class InputText(ResponseFields):
    type: Literal["input_text"]
    text: str


class OutputText(ResponseFields):
    """Of an earlier answer."""

    type: Literal["output_text"]
    text: str
    annotations: list[Any] = Field(default_factory=list)
    logprobs: list[Any] | None = None


class ReasoningText(ResponseFields):
    type: Literal["reasoning_text", "summary_text"]
    text: str


class Item(ResponseFields):
    id: str | None = None
    status: str | None = None


class MessageItem(Item):
    type: Literal["message"] = "message"
    role: Literal["user", "assistant", "system", "developer"]
    content: str | list[Annotated[InputText | OutputText, Discriminator("type")]]


class ReasoningItem(Item):
    type: Literal["reasoning"]
    summary: list[ReasoningText] = Field(default_factory=list)
    content: list[ReasoningText] | None = None


class CallItem(Item):
    type: Literal["function_call"]
    call_id: str
    name: str
    arguments: str


class CallOutputItem(Item):
    type: Literal["function_call_output"]
    call_id: str
    output: str | list[InputText]


def _item_type(item: Any) -> str:
    return str(item.get("type", "message")) if isinstance(item, dict) else str(getattr(item, "type", "message"))


AnyItem = Annotated[
    Annotated[MessageItem, Tag("message")]
    | Annotated[ReasoningItem, Tag("reasoning")]
    | Annotated[CallItem, Tag("function_call")]
    | Annotated[CallOutputItem, Tag("function_call_output")],
    Discriminator(_item_type),
]


class FunctionTool(ResponseFields):
    type: Literal["function"]
    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = Field(
        None, description="true: calls follow the schema also with tool_choice auto; where one is asked for, all do"
    )


class TextFormat(ResponseFields):
    type: Literal["text", "json_object", "json_schema"] = "text"
    name: str | None = Field(None, description="the caller's own name of it")
    description: str | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = Field(None, description="every answer follows its schema, whatever this says")

    def guided(self) -> Guided | None:
        if (self.schema_ is not None) != (self.type == "json_schema"):
            raise RequestError("text.format.schema belongs to the type json_schema; give both or neither.")
        if self.schema_ is not None:
            return Guided(json_schema=self.schema_)
        return Guided(json_object=True) if self.type == "json_object" else None


class TextConfig(ResponseFields):
    format: TextFormat | None = None


class StreamOptions(ResponseFields):
    """Nothing of it is here."""


class CreateFields(ResponseFields):
    model: str | None = None
    input: str | list[AnyItem]
    instructions: str | None = None
    max_output_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: float | None = None
    top_p: float | None = None
    text: TextConfig | None = None
    tools: list[FunctionTool] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = Field(None, description="false: the answer ends with its first call")
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    metadata: dict[str, str] | None = Field(None, description="notes of the caller's own, given back")
    user: str | None = Field(None, description="a note of the caller's own; it changes nothing")
    safety_identifier: str | None = Field(None, description="as user")
    prompt_cache_key: str | None = Field(None, description="prompts that begin alike are shared whatever this says")
    # The rest are ours, as in chats.
    top_k: int | None = None
    min_p: float | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    logit_bias: dict[str, float] | None = None
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)
    priority: int = 0
    cache_salt: str = ""

    def params(self, generation: Mapping[str, Any]) -> SamplingParams:
        text_format = None if self.text is None else self.text.format
        return asked_sampling(
            generation,
            self.model_dump(include={"temperature", "top_p", "top_k", "min_p", "seed", "stop"}, exclude_none=True),
            logit_bias=self.logit_bias,
            max_tokens=self.max_output_tokens,
            guided=None if text_format is None else text_format.guided(),
        )

    def chat(self) -> Chat:
        return Chat(
            messages=list(self._messages()),
            tools=[{"type": "function", "function": _function(tool)} for tool in self.tools or []],
            tool_choice=self._tool_choice(),
            parallel_tool_calls=self.parallel_tool_calls is not False,
            template_values=self.chat_template_kwargs,
            priority=self.priority,
            cache_salt=self.cache_salt,
        )

    def _tool_choice(self) -> Any:
        if isinstance(self.tool_choice, dict):
            rest = {name: value for name, value in self.tool_choice.items() if name != "type"}
            return {"type": self.tool_choice.get("type"), "function": rest}
        return "auto" if self.tool_choice is None else self.tool_choice

    def _messages(self) -> Iterator[dict[str, Any]]:
        if self.instructions is not None:
            yield {"role": "system", "content": self.instructions}
        if isinstance(self.input, str):
            yield {"role": "user", "content": self.input}
            return
        answer: dict[str, Any] = {}  # the parts of one that stand beside each other
        for item in self.input:
            part = _answer_part(item)
            if answer and (part is None or not _goes_on(answer, part)):
                yield {"role": "assistant", **answer}
                answer = {}
            if part is None:
                yield _message(item)
            else:
                calls = [*answer.get("tool_calls", ()), *part.get("tool_calls", ())]
                answer |= part | ({"tool_calls": calls} if calls else {})
        if answer:
            yield {"role": "assistant", **answer}


_ORDER = ("reasoning_content", "content", "tool_calls")


def _goes_on(answer: Mapping[str, Any], part: Mapping[str, Any]) -> bool:
    """An answer thinks, speaks and calls, in this order; only calls come more than once."""
    newest = max(_ORDER.index(name) for name in answer)
    return all(_ORDER.index(name) > newest or name == "tool_calls" for name in part)


def _answer_part(item: Any) -> dict[str, Any] | None:
    """What the item is of an answer of the model; None for what others say."""
    match item:
        case MessageItem(role="assistant"):
            return {"content": _text(item.content)}
        case ReasoningItem():
            return {"reasoning_content": _text(item.content or item.summary)}
        case CallItem():
            function = {"name": item.name, "arguments": item.arguments}
            return {"tool_calls": [{"id": item.call_id, "type": "function", "function": function}]}
    return None


def _message(item: Any) -> dict[str, Any]:
    if isinstance(item, CallOutputItem):
        return {"role": "tool", "tool_call_id": item.call_id, "content": _text(item.output)}
    return {"role": item.role, "content": _text(item.content)}


def _text(content: str | list[Any]) -> str:
    return content if isinstance(content, str) else "\n".join(part.text for part in content)


def _function(tool: FunctionTool) -> dict[str, Any]:
    return tool.model_dump(include={"name", "description", "parameters", "strict"}, exclude_none=True)
