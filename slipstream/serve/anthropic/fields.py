"""Bodies of Anthropic's messages; the fields here are all there are."""

import json
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Discriminator, Field

from slipstream.errors import RequestError
from slipstream.schema.guided import Guided
from slipstream.schema.sampling import SamplingParams
from slipstream.serve.chats import Chat
from slipstream.serve.fields import Fields, NotHere, asked_sampling

_ON_A_SERVER = "no tools are run here"
_NOT_OURS = "it is of Anthropic's own servers"

NOT_HERE: NotHere = {
    "container": (_ON_A_SERVER, ()),
    "mcp_servers": (_ON_A_SERVER, ([],)),
    "context_management": ("a conversation is not shortened here", ()),
    "diagnostics": (_NOT_OURS, ()),
    "inference_geo": (_NOT_OURS, ()),
    "user_profile_id": (_NOT_OURS, ()),
    "workspace_id": (_NOT_OURS, ()),
    "service_tier": ("there is one tier", ("auto", "standard_only")),
    "speed": ("there is one speed", ("standard",)),
    "effort": ("how long to think is the model's to say", ()),
    "budget_tokens": ("how long to think is the model's to say; ask for thinking of the type adaptive", ()),
    "display": ("thinking is shown as it is", ("summarized",)),
    "citations": ("answers have none", ([], {"enabled": False})),
    "caller": ("calls are the model's own", ({"type": "direct"},)),
    "allowed_callers": ("calls are the model's own", (["direct"],)),
    "toolset_name": (_ON_A_SERVER, ()),
    "defer_loading": ("all tools are shown to the model", (False,)),
    "eager_input_streaming": ("calls stream as they are written", (True, False)),
    "input_examples": ("a chat template shows none; put them into the description", ([],)),
    "strict": ("a call follows its schema where tool_choice asks for one, any or tool", (False,)),
}  # fmt: skip


class MessageFields(Fields):
    not_here: ClassVar[NotHere] = NOT_HERE


class CacheControl(MessageFields):
    """Prompts that begin alike share what was computed of them, whatever this says."""

    type: Literal["ephemeral"]
    ttl: str | None = None


class Part(MessageFields):
    cache_control: CacheControl | None = None


class TextBlock(Part):
    type: Literal["text"]
    text: str


class ThinkingBlock(MessageFields):
    type: Literal["thinking"]
    thinking: str
    signature: str = Field("", description="answers here have an empty one")


class ToolUseBlock(Part):
    type: Literal["tool_use"]
    id: str
    name: str
    input: dict[str, Any]


class ToolResultBlock(Part):
    type: Literal["tool_result"]
    tool_use_id: str
    content: str | list[TextBlock] = ""
    is_error: bool = Field(False, description="the model is shown 'Error: ' before the content")


AnyBlock = Annotated[TextBlock | ThinkingBlock | ToolUseBlock | ToolResultBlock, Discriminator("type")]


class MessageParam(MessageFields):
    role: Literal["user", "assistant", "system"]
    content: str | list[AnyBlock]


class ToolParam(Part):
    type: Literal["custom"] | None = None
    name: str
    description: str | None = None
    input_schema: dict[str, Any]


class ToolChoice(MessageFields):
    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool = Field(False, description="true: the answer ends with its first call")


class Thinking(MessageFields):
    """What the chat template is told as enable_thinking."""

    type: Literal["adaptive", "enabled", "disabled"]


class JsonFormat(MessageFields):
    type: Literal["json_schema"]
    schema_: dict[str, Any] = Field(alias="schema")


class OutputConfig(MessageFields):
    format: JsonFormat | None = None


class Metadata(MessageFields):
    user_id: str | None = Field(None, description="a note of the caller's own; it changes nothing")


class CountFields(Part):
    """A conversation."""

    model: str | None = None
    system: str | list[TextBlock] | None = None
    messages: Annotated[list[MessageParam], Field(min_length=1)]
    tools: list[ToolParam] | None = None
    tool_choice: ToolChoice | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None

    def chat(self) -> Chat:
        if self.messages[-1].role == "assistant":
            raise RequestError("messages ends with an assistant's, which is not gone on with; end with a user's.")
        choice = self.tool_choice or ToolChoice(type="auto", disable_parallel_tool_use=False)
        return Chat(
            messages=list(self._messages()),
            tools=[_tool(tool) for tool in self.tools or []],
            tool_choice=_choice(choice),
            parallel_tool_calls=not choice.disable_parallel_tool_use,
            template_values={} if self.thinking is None else {"enable_thinking": self.thinking.type != "disabled"},
        )

    def _messages(self) -> Iterator[dict[str, Any]]:
        if self.system is not None:
            yield {"role": "system", "content": _text(self.system)}
        for message in self.messages:
            if isinstance(message.content, str):
                yield {"role": message.role, "content": message.content}
            elif message.role == "assistant":
                yield _answer(message.content)
            else:
                yield from _said(message.role, message.content)


class CreateFields(CountFields):
    max_tokens: Annotated[int, Field(ge=1)]
    stop_sequences: list[str] | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    stream: bool | None = None
    metadata: Metadata | None = None

    def params(self, generation: Mapping[str, Any]) -> SamplingParams:
        wanted = None if self.output_config is None else self.output_config.format
        return asked_sampling(
            generation,
            self.model_dump(include={"temperature", "top_p", "top_k"}, exclude_none=True),
            logit_bias=None,
            max_tokens=self.max_tokens,
            stop=self.stop_sequences or [],
            guided=None if wanted is None else Guided(json_schema=wanted.schema_),
        )


def _tool(tool: ToolParam) -> dict[str, Any]:
    function = tool.model_dump(include={"name", "description"}, exclude_none=True)
    return {"type": "function", "function": {**function, "parameters": tool.input_schema}}


def _choice(choice: ToolChoice) -> Any:
    if (choice.name is not None) != (choice.type == "tool"):
        raise RequestError("tool_choice.name belongs to the type tool; give both or neither.")
    if choice.type == "tool":
        return {"type": "function", "function": {"name": choice.name}}
    return "required" if choice.type == "any" else choice.type


def _answer(blocks: list[AnyBlock]) -> dict[str, Any]:
    """An earlier answer as OpenAI's chats have it."""
    texts = [block for block in blocks if isinstance(block, TextBlock)]
    thoughts = "\n".join(block.thinking for block in blocks if isinstance(block, ThinkingBlock))
    calls = [block for block in blocks if isinstance(block, ToolUseBlock)]
    if len(texts) + len(calls) < sum(not isinstance(block, ThinkingBlock) for block in blocks):
        raise RequestError("messages has a tool_result of the assistant; results are in a user's message.")
    message: dict[str, Any] = {"role": "assistant", "content": _text(texts) if texts else None}
    if thoughts:
        message["reasoning_content"] = thoughts
    if calls:
        message["tool_calls"] = [
            {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": json.dumps(call.input)}}
            for call in calls
        ]
    return message


def _said(role: str, blocks: list[AnyBlock]) -> Iterator[dict[str, Any]]:
    """What a user or the system says: results first, as they come first, then the text."""
    texts: list[TextBlock] = []
    for block in blocks:
        match block:
            case TextBlock():
                texts.append(block)
            case ToolResultBlock():
                if texts:
                    raise RequestError("messages has a tool_result after a text; put the results first.")
                result = ("Error: " if block.is_error else "") + _text(block.content)
                yield {"role": "tool", "tool_call_id": block.tool_use_id, "content": result}
            case _:
                raise RequestError(f"messages has a {block.type} of the {role}; only the assistant has those.")
    if texts:
        yield {"role": role, "content": _text(texts)}


def _text(content: str | list[TextBlock]) -> str:
    return content if isinstance(content, str) else "\n".join(block.text for block in content)
