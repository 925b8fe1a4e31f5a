"""The offline front door: open a model and generate.

    with LLM("smollm2") as llm:
        print(llm.generate("The capital of France is").outputs[0].text)

llm.py holds the class, handles.py what becomes of one request, outputs.py what a caller gets.
"""

from slipstream.api.llm import LLM
from slipstream.api.outputs import CompletionOutput, RequestOutput, ScoreOutput

__all__ = ["LLM", "CompletionOutput", "RequestOutput", "ScoreOutput"]
