"""What an answer is made of: as it streams (deltas), and whole."""

from collections.abc import Iterable
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Content:
    """Text for the user."""

    text: str


@dataclass(frozen=True)
class Reasoning:
    """Text of the model's reasoning."""

    text: str


@dataclass(frozen=True)
class CallStart:
    """A call begins. index counts the starts of this answer, from 0."""

    index: int
    id: str
    name: str


@dataclass(frozen=True)
class CallArguments:
    """The next piece of a call's arguments, as JSON text."""

    index: int
    text: str


@dataclass(frozen=True)
class CallEnd:
    """The call is whole. One that has started and does not end was no call: its text comes as content."""

    index: int


Delta = Content | Reasoning | CallStart | CallArguments | CallEnd


@dataclass(frozen=True)
class ToolCall:
    id: str
    name: str
    arguments: str  # a JSON object, as the model wrote it


@dataclass
class Answer:
    """The sum of deltas."""

    content: str = ""
    reasoning: str = ""
    tool_calls: list[ToolCall] = field(default_factory=list)  # whole calls alone

    @classmethod
    def of(cls, deltas: Iterable[Delta]) -> "Answer":
        answer = cls()
        begun: dict[int, ToolCall] = {}
        for delta in deltas:
            match delta:
                case Content(text):
                    answer.content += text
                case Reasoning(text):
                    answer.reasoning += text
                case CallStart(index, call_id, name):
                    begun[index] = ToolCall(call_id, name, "")
                case CallArguments(index, text):
                    call = begun[index]
                    begun[index] = ToolCall(call.id, call.name, call.arguments + text)
                case CallEnd(index):
                    answer.tool_calls.append(begun[index])
        return answer
