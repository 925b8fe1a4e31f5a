"""Slipstream: build, run and serve large language models.

    from slipstream import LLM, SamplingParams

    with LLM("smollm2") as llm:
        print(llm.generate("The capital of France is", SamplingParams(max_tokens=8)).outputs[0].text)

The stations have their own packages: `slipstream.checkpoint.convert`, `slipstream.build.build`. Public names are
loaded when first used, so that `import slipstream` stays light: no torch, no numpy.
"""

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

from slipstream import errors

if TYPE_CHECKING:
    from slipstream.api import LLM, CompletionOutput, RequestOutput
    from slipstream.schema.guided import Guided
    from slipstream.schema.sampling import SamplingParams

# How long an idle thread of torch's pool spins before it sleeps; read once, when torch is first imported. The
# default is milliseconds: with a busy neighbour on the machine, every small product then waits for a time slice.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

__version__ = "0.1.0"

__all__ = ["LLM", "CompletionOutput", "Guided", "RequestOutput", "SamplingParams", "__version__", "errors"]

_HOMES = {
    "LLM": "slipstream.api",
    "CompletionOutput": "slipstream.api",
    "Guided": "slipstream.schema.guided",
    "RequestOutput": "slipstream.api",
    "SamplingParams": "slipstream.schema.sampling",
}


def __getattr__(name: str) -> Any:
    """Load a public name on first use (PEP 562)."""
    if name not in _HOMES:
        raise AttributeError(f"module 'slipstream' has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
