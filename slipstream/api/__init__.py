"""The offline front door: open a model and generate.

    with LLM("smollm2") as llm:
        print(llm.generate("The capital of France is").outputs[0].text)

llm.py holds the class. building.py finds or builds the engine that it opens, and options.py checks what it was given.
requests.py makes what the engine takes of what a caller gives, calls.py sends it and waits, handles.py holds what
becomes of it, outputs.py what a caller gets. What a server's front has of these (requests, handles, answers) imports no
torch.
"""

from typing import TYPE_CHECKING, Any

from slipstream.api.outputs import CompletionOutput, RequestOutput, ScoreOutput

if TYPE_CHECKING:
    from slipstream.api.llm import LLM

__all__ = ["LLM", "CompletionOutput", "RequestOutput", "ScoreOutput"]


def __getattr__(name: str) -> Any:
    """LLM on first use (PEP 562): a server's front has no engine, and no torch."""
    if name != "LLM":
        raise AttributeError(f"module 'slipstream.api' has no attribute {name!r}")
    from slipstream.api.llm import LLM

    return LLM
