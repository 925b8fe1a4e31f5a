"""BuildConfig: the limits and choices fixed when an engine is built. RuntimeConfig: those fixed when it is started."""

from dataclasses import dataclass
from enum import StrEnum

from slipstream.schema.kv import KVGroup

DTYPES = ("float32", "bfloat16", "float16")
KV_DTYPES = {"fp8": "float8_e4m3fn", "int8": "int8"}  # of a KV cache in 8 bits, by their names in the field
KV_DTYPES_OF = {"float32": ("bfloat16", "float16")}  # of a KV cache in 16 bits, in an engine that computes in more
MAX_BATCH_SIZE = 1 << 16  # a slot of sampling state each
MAX_TOKENS_PER_BLOCK = 1 << 16  # attention reads whole blocks
MAX_RANKS = 1024
MAX_RECORDED_TOKENS = 2048  # longer steps of a GPU are launched from Python, behind their own work

# TensorRT-LLM's names for what may be left out of an engine: the ops that then run their plain reference (patterns).
PLUGINS = {
    "gpt_attention": ("*attention*", "*kv_write*"),
    "gemm": ("linear", "linear_fp8*"),
    "fp8_rowwise_gemm": ("linear_fp8",),
    "weight_only_quant_matmul": ("linear_w[48]a16",),
    "smooth_quant_gemm": ("linear_w8a8", "linear_panels*"),
    "lookup": ("embedding",),
    "rmsnorm": ("*rms_norm*",),
    "layernorm": ("*layer_norm*",),
    "rmsnorm_quantization": ("*rms_norm_quantize",),
    "layernorm_quantization": ("*layer_norm_quantize",),
    "quantize_per_token": ("quantize_*",),
    "moe": ("experts",),
}


@dataclass(frozen=True, kw_only=True)
class BuildConfig:
    dtype: str = "auto"  # auto: the fastest safe one for the device
    kv_cache_dtype: str = (
        "auto"  # of KV_DTYPES or KV_DTYPES_OF, or the engine's dtype; auto: what the model says, else build/kv_cache.py
    )
    quantization: str | None = None  # a qformat that needs no texts: weights are rounded as they are read
    max_batch_size: int = 64  # sequences in one step
    max_num_tokens: int = 2048  # tokens in one step, over all sequences
    max_seq_len: int | None = None  # prompt + output of one sequence; default: the model's own limit
    tokens_per_block: int = 16  # KV block size
    disabled_passes: tuple[str, ...] = ()
    extra_passes: tuple[str, ...] = ()  # a user's own, "module:name" each, run after the fusions
    disabled_plugins: tuple[str, ...] = ()  # of PLUGINS
    tp_size: int = 1  # ranks that share each layer (tensor parallelism)
    pp_size: int = 1  # stages that follow each other, each with some of the layers (pipeline parallelism)
    moe_ep_size: int = 1  # of a layer's ranks, those that share out whole experts: 1 for none, or all of them


class CapacityPolicy(StrEnum):
    """When a waiting request may start (TensorRT-LLM's CapacitySchedulerPolicy)."""

    GUARANTEED_NO_EVICT = "guaranteed_no_evict"  # only if all its blocks, to max_tokens, are certain
    MAX_UTILIZATION = "max_utilization"  # as soon as its prompt fits; the newest request is paused when blocks run out
    STATIC_BATCH = "static_batch"  # only when nothing runs; the batch is closed until all of it has ended


class QueuePolicy(StrEnum):
    FIFO = "fifo"
    PRIORITY = "priority"  # lower GenerateRequest.priority first, then arrival


class DraftShape(StrEnum):
    CHAIN = "chain"  # each draft follows the one before it
    TREE = "tree"  # the first few of its drafts are a tree as well
    WHOLE = "whole"  # a tree that is verified as a whole or not at all


@dataclass(frozen=True, kw_only=True)
class RuntimeConfig:
    """How the scheduler runs an engine. Torch-free; the KV pool's size is decided by whoever opens the engine."""

    num_blocks: int
    kv_groups: tuple[KVGroup, ...] = (KVGroup(),)
    tokens_per_block: int = 16
    max_batch_size: int = 64
    max_num_tokens: int = 2048
    max_seq_len: int = 2048
    capacity_policy: CapacityPolicy = CapacityPolicy.GUARANTEED_NO_EVICT
    queue_policy: QueuePolicy = QueuePolicy.FIFO
    enable_chunked_prefill: bool = True
    enable_block_reuse: bool = True
    max_draft_len: int = 0  # drafts of a sequence that a step may verify
    draft_shape: DraftShape = DraftShape.CHAIN
    is_adaptive: bool = False  # whether fewer drafts are asked for, or none, where that is faster
    # A drafter's KV of a token may depend on the next one: of a prefix found, the last token is computed again.
    recomputes_last_found: bool = False
    tokens_ahead: int = 0  # beyond a step's, whose KV a drafter computes in the sequence's next blocks
    takes_late_steps: bool = False  # whether the worker begins a step where the one before it has got to
    num_stages: int = 1  # of a pipeline: as many steps are under way at once, each of other sequences
