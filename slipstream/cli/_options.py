"""Options that several verbs share, spelled and explained once. Where TensorRT-LLM has one, its name is used."""

import os
import re
from pathlib import Path
from typing import Annotated

import typer

from slipstream.errors import UsageError


def _share_threads(count: int | None) -> int | None:
    """OpenMP reads this once, when torch is imported: later here, and in a server's other processes."""
    if count is not None:
        os.environ["OMP_NUM_THREADS"] = str(count)
    return count


Dtype = Annotated[
    str, typer.Option(help="float32, bfloat16 or float16. auto: float32 on a CPU, the model's own on a GPU.")
]
KvCacheDtype = Annotated[
    str,
    typer.Option(
        help="How keys and values are kept: fp8, int8, the --dtype, or bfloat16 or float16 under float32. auto: as the "
        "model says, else float16 on a CPU with a --quantization of activations, else the --dtype."
    ),
]
Quantization = Annotated[
    str | None,
    typer.Option(
        help="Round the weights as they are read: fp8, fp8_block, int8, int8_wo, int4_wo or nvfp4. slipstream quantize "
        "makes better ones. gguf: the file's own bits, on a CPU."
    ),
]
ModelClsFile = Annotated[
    Path | None, typer.Option(help="A model file of your own, for an architecture not known here; it is run as Python.")
]
ModelClsName = Annotated[str, typer.Option(help="The class in --model_cls_file.")]
Device = Annotated[str, typer.Option(help="cpu, cuda or cuda:N. auto: the GPU where there is one.")]
Threads = Annotated[
    int | None,
    typer.Option(
        min=1,
        callback=_share_threads,
        help="Threads that compute on a CPU, over all ranks.  [default: OMP_NUM_THREADS, else one a core]",
    ),
]
TpSize = Annotated[
    int | None,
    typer.Option(
        min=1, help="Processes that share each layer, on as many GPUs.  [default: 1, or as an engine was built]"
    ),
]
PpSize = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Stages of layers that follow each other, each of --tp_size processes.  [default: 1, or as an engine was "
        "built]",
    ),
]
MoeEpSize = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="As --tp_size to give each process some experts whole, or 1 for a part of each.  [default: 1, or as an "
        "engine was built]",
    ),
]
TokenizerDir = Annotated[
    Path | None, typer.Option(help="Folder of the tokenizer, where it is not the model's or engine's own.")
]
SystemPrompt = Annotated[str | None, typer.Option(help="What the model is told before the conversation.")]
ChatTemplate = Annotated[Path | None, typer.Option(help="File with a jinja template that replaces the model's own.")]
Plugin = Annotated[
    list[str] | None,
    typer.Option(help="Python module to import first, which declares ops of the engine; may be given again."),
]

MaxBatchSize = Annotated[int | None, typer.Option(min=1, help="Most sequences in one step.")]
MaxNumTokens = Annotated[int | None, typer.Option(min=1, help="Most tokens in one step, over all sequences.")]
MaxSeqLen = Annotated[
    int | None, typer.Option(min=1, help="Most tokens of one sequence, prompt and output.  [default: the model's own]")
]
KvCacheMaxTokens = Annotated[
    int | None,
    typer.Option(
        "--kv_cache_max_tokens",
        "--max_tokens_in_paged_kv_cache",
        min=1,
        help="Size of the KV cache in tokens.  [default: what fits]",
    ),
]
KvCacheMaxBytes = Annotated[str | None, typer.Option(help="Size of the KV cache, such as 8GiB.  [default: what fits]")]
KvCacheFraction = Annotated[
    float,
    typer.Option(
        "--kv_cache_free_memory_fraction",
        "--kv_cache_free_gpu_memory_fraction",
        help="Part of the memory that weights and the largest step leave, for the KV cache.",
    ),
]
AttentionWindow = Annotated[
    list[int] | None,
    typer.Option(help="Most tokens that a token sees; several are for the layers in turn.  [default: the model's own]"),
]
SinkTokens = Annotated[
    int, typer.Option(min=0, help="Of that window, the first tokens of the text, which stay in sight (StreamingLLM).")
]
BlockReuse = Annotated[bool, typer.Option(help="Prompts that begin alike share their KV blocks.")]
ChunkedContext = Annotated[bool, typer.Option(help="Long prompts are computed piece by piece, beside other work.")]
Deterministic = Annotated[
    bool,
    typer.Option("--deterministic", help="A text never depends on what runs beside it; GPU only, and slower."),
]
Speculative = Annotated[
    str | None,
    typer.Option(
        help='Guess tokens for each step to verify, as JSON: {"method": "ngram", "max_draft_len": 8}. Texts stay as is.'
    ),
]
CapacityPolicy = Annotated[
    str, typer.Option(help="When a waiting request may start: guaranteed_no_evict, max_utilization or static_batch.")
]

_UNITS = {"": 1, "B": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "TiB": 1 << 40}


def parse_bytes(flag: str, text: str | None) -> int | None:
    """ "8GiB", "1.5 GiB" or "1073741824". Raises UsageError."""
    if text is None:
        return None
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMGT]iB|B|)", text)
    if found is None:
        raise UsageError(f"{flag} is {text!r}; it must be a number of bytes, KiB, MiB, GiB or TiB, such as 8GiB.")
    return int(float(found[1]) * _UNITS[found[2]])
