"""The flags of other tools that are no options of ours: what each means here, or why it means nothing.

From TensorRT-LLM (quantize.py, convert_checkpoint.py and build.py of its examples, trtllm-build, run.py) and TGI's
launcher. A row is a flag and its answers by value: Note (nothing to do, said in a line), Refusal (it asks for what is
not there), Means (our own options that say the same; none where that is how things are anyway), Reads (the same, by the
value). The help of each verb is printed from this table.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass

ANY = "*"  # whatever the value
BARE = ""  # no value: a switch


@dataclass(frozen=True)
class Note:
    why: str


@dataclass(frozen=True)
class Refusal:
    why: str


@dataclass(frozen=True)
class Means:
    arguments: tuple[str, ...] = ()


@dataclass(frozen=True)
class Reads:
    """Our own arguments depend on the value; ValueError where it is not as `form` says."""

    arguments: Callable[[str], tuple[str, ...]]
    form: str  # what the flag's value means, and becomes


Answer = Note | Refusal | Means | Reads
Answers = Mapping[str, Answer]
SO_ANYWAY = Means()


def note(why: str) -> Answers:
    return {ANY: Note(why)}


def noted_switch(why: str) -> Answers:
    return {BARE: Note(why)}


def switch(enable: Answer, disable: Answer) -> dict[str, Answer]:
    """trtllm-build's `--flag enable`; `--flag` alone is the same."""
    return {BARE: enable, "enable": enable, "disable": disable}


def always(why: str) -> Answers:
    return switch(SO_ANYWAY, Note(why))


def refused(why: str, unless: tuple[str, ...] = ()) -> Answers:
    """For `unless`, the values that ask for nothing, there is nothing to refuse."""
    return dict.fromkeys(unless, SO_ANYWAY) | {ANY: Refusal(why)}


def refused_switch(why: str) -> Answers:
    return {BARE: Refusal(why)}


_PLUGIN_DTYPES = ("float32", "float16", "bfloat16", "int32", "fp8", "nvfp4")
_MEASURED = "each op gets the kernel that the build measures to be fastest, in the engine's own dtype"
_NO_OP = "no op here is computed by it"
_NOT_SHARED = "ranks share the model by --tp_size, --pp_size and --moe_ep_size alone; give 1 or leave it out"
_BUILT_FOR = (
    "the ranks are those of an engine, slipstream build --tp_size --pp_size, as --engine_dir; give 1 or leave it out"
)
_IN_THE_BUILD = "a checkpoint is whole; slipstream build --tp_size --pp_size shares it out"
_NO_QUANTIZING = "slipstream quantize does that, with --qformat int8_wo and others; go on with what it writes"
_QUANTIZES_ONLY = "it matters to quantizing only"
_NO_SUCH_DRAFTS = (
    "drafts are of n-grams, lookahead's window, a draft model or heads of Medusa, EAGLE or ReDrafter, as "
    "--speculative says; leave it out, the texts are the same without it"
)
_DRAFT_MODEL = '--speculative {"method": "draft_model", "model": E, "max_draft_len": N}'
_NGRAM_OF_N = '--speculative {"method": "ngram", "max_draft_len": N}'
_WINDOW = '--speculative {"method": "lookahead", "window": W, "ngram": N, "guesses": G}'
_NO_DRAFTING_BUILD = "any engine can verify drafts; run and serve make them, with --speculative"
_NO_ADAPTERS = "adapters (LoRA, prompt tuning) are not here yet; merge them into the weights first"
_FROM_CONFIG = "the model's config.json says it"
_PER_REQUEST = "every engine gives logprobs of prompts and outputs; a request asks for them (SamplingParams)"
_NO_FILES = "outputs are not written to files yet; redirect stdout, or use LLM.generate"
_ONE_PROCESS = "one process builds the one engine file"
_ALWAYS_PACKED = "input is always packed, without padding"
_ALWAYS_PAGED = "the KV cache is always paged"
_LEVELS = "errors are one sentence each; SLIPSTREAM_DEBUG=1 adds the traceback"


def plugin(name: str) -> Answers:
    """`disable` takes the op's plain reference; any dtype leaves the choice to measurement."""
    return switch(SO_ANYWAY, Means(("--disable_plugin", name))) | _dtypes(Note(_MEASURED)) | {"auto": SO_ANYWAY}


def other_plugin(why: str = _NO_OP) -> Answers:
    return switch(Note(why), SO_ANYWAY) | _dtypes(Note(why)) | {"auto": Note(why)}


def _dtypes(answer: Answer) -> dict[str, Answer]:
    return dict.fromkeys(_PLUGIN_DTYPES, answer)


QUANTIZING: dict[str, Answers] = {
    "--qformat": refused(_NO_QUANTIZING, unless=("full_prec",)),
    "--int8_kv_cache": {BARE: Means(("--kv_cache_dtype", "int8"))},
    "--fp8_kv_cache": {BARE: Means(("--kv_cache_dtype", "fp8"))},
    "--smoothquant": refused(_NO_QUANTIZING),
    "--use_smooth_quant": refused_switch(_NO_QUANTIZING),
    "--per_channel": refused_switch(_NO_QUANTIZING),
    "--per_token": refused_switch(_NO_QUANTIZING),
    "--enable_fp8": refused_switch(_NO_QUANTIZING),
    "--autoq_format": refused(_NO_QUANTIZING),
    "--auto_quantize_bits": refused(_NO_QUANTIZING),
    "--quantize_lm_head": refused_switch(_NO_QUANTIZING),
    "--awq_block_size": note(_QUANTIZES_ONLY),
    "--group_size": note(_QUANTIZES_ONLY),
    "--calib_dataset": note(_QUANTIZES_ONLY),
    "--calib_size": note(_QUANTIZES_ONLY),
    "--calib_max_seq_length": note(_QUANTIZES_ONLY),
    "--tokenizer_max_seq_length": note(_QUANTIZES_ONLY),
    "--batch_size": note(_QUANTIZES_ONLY),
    "--seed": note(_QUANTIZES_ONLY),
}

# Where weights are rounded as they are read.
ON_LOAD: dict[str, Answers] = {
    "--use_weight_only": {BARE: Means(("--quantization", "int8_wo"))},
    "--weight_only_precision": {
        "int8": Means(("--quantization", "int8_wo")),
        "int4": Means(("--quantization", "int4_wo")),
        ANY: Refusal(_NO_QUANTIZING),
    },
}
NOT_ON_LOAD: dict[str, Answers] = {
    "--use_weight_only": refused_switch(_NO_QUANTIZING),
    "--weight_only_precision": refused(_NO_QUANTIZING),
}

_OTHER_RANKS = ("cp_size", "auto_parallel", "moe_tp_size")
BUILDING_RANKS: dict[str, Answers] = {f"--{name}": refused(_NOT_SHARED, unless=("1",)) for name in _OTHER_RANKS}
CONVERTING_RANKS: dict[str, Answers] = {
    f"--{name}": note(_IN_THE_BUILD) for name in ("tp_size", "pp_size", "world_size", "moe_ep_size", *_OTHER_RANKS)
}


def _ngram(max_draft_len: int) -> tuple[str, ...]:
    return ("--speculative", json.dumps({"method": "ngram", "max_draft_len": max_draft_len})) if max_draft_len else ()


def _prompt_lookup(value: str) -> tuple[str, ...]:
    max_draft_len, _max_ngram, _devices = json.loads(value)
    return _ngram(int(max_draft_len))


def _drafted_by(**options: object) -> tuple[str, ...]:
    return ("--speculative", json.dumps({"method": "draft_model", **options}))


def _draft_target(value: str) -> tuple[str, ...]:
    max_draft_len, _draft_devices, _target_devices, _use_logits = json.loads(
        value.replace("False", "false").replace("True", "true")
    )
    return _drafted_by(max_draft_len=int(max_draft_len))


def _lookahead(value: str) -> tuple[str, ...]:
    window, ngram, guesses = map(int, json.loads(value))
    if ngram == 1:  # how TensorRT-LLM has it off
        return ()
    options = {"method": "lookahead", "window": window, "ngram": ngram, "guesses": guesses}
    return ("--speculative", json.dumps(options))


def _tree_of(method: str) -> Answers:
    def read(value: str) -> tuple[str, ...]:
        json.loads(value)
        return ("--speculative", json.dumps({"method": method, "choices": value}))

    return {ANY: Reads(read, f'[[0], [0, 0], ...]: --speculative {{"method": "{method}", "model": F, "choices": C}}')}


DRAFTING_BUILD: dict[str, Answers] = {
    "--speculative_decoding_mode": {
        **dict.fromkeys(
            ("draft_tokens_external", "medusa", "lookahead_decoding", "explicit_draft_tokens", "eagle"),
            Note(_NO_DRAFTING_BUILD),
        ),
        ANY: Refusal(_NO_SUCH_DRAFTS),
    },
    "--max_draft_len": note(_NO_DRAFTING_BUILD),
    "--num_medusa_heads": refused(_NO_SUCH_DRAFTS, unless=("0",)),
    "--num_medusa_layers": refused(_NO_SUCH_DRAFTS, unless=("0",)),
    "--medusa_model_dir": refused(_NO_SUCH_DRAFTS),
}

DRAFTING: dict[str, Answers] = {
    "--draft_engine_dir": {ANY: Reads(lambda value: _drafted_by(model=value), f"E: {_DRAFT_MODEL}")},
    "--draft_target_model_config": {ANY: Reads(_draft_target, f"[N, [DEVICES], [DEVICES], LOGITS]: {_DRAFT_MODEL}")},
    "--prompt_lookup_config": {ANY: Reads(_prompt_lookup, f"[N, LONGEST, [DEVICES]]: {_NGRAM_OF_N}")},
    "--medusa_choices": _tree_of("medusa"),
    "--eagle_choices": _tree_of("eagle"),
    "--lookahead_config": {ANY: Reads(_lookahead, f"[W, N, G]: {_WINDOW}")},
}

# What convert_checkpoint.py and the one-step build.py of v0.7 are told of a model.
DESCRIBING: dict[str, Answers] = {
    "--model_version": note(_FROM_CONFIG),
    "--model_type": note(_FROM_CONFIG),
    "--rotary_base": note(_FROM_CONFIG),
    "--rotary_scaling": refused("the model's config.json says it; set rope_scaling there"),
    "--load_by_shard": noted_switch("weights are always streamed, one tensor at a time"),
    "--load_model_on_cpu": noted_switch("weights are always streamed, one tensor at a time"),
    "--use_parallel_embedding": noted_switch("one device has nothing to share out"),
    "--embedding_sharding_dim": note("one device has nothing to share out"),
    "--use_embedding_sharing": noted_switch("a head tied to the embedding is stored once, where config.json ties them"),
}

# v0.7 wrote a plugin's name without `disable`: the flag or nothing.
PLUGINS: dict[str, Answers] = {
    "--gpt_attention_plugin": plugin("gpt_attention"),
    "--use_gpt_attention_plugin": plugin("gpt_attention"),
    "--gemm_plugin": plugin("gemm"),
    "--use_gemm_plugin": plugin("gemm"),
    "--low_latency_gemm_plugin": other_plugin(_MEASURED),
    "--weight_only_quant_matmul_plugin": plugin("weight_only_quant_matmul"),
    "--weight_only_groupwise_quant_matmul_plugin": plugin("weight_only_quant_matmul"),
    "--smooth_quant_gemm_plugin": plugin("smooth_quant_gemm"),
    "--lookup_plugin": plugin("lookup"),
    "--use_lookup_plugin": plugin("lookup"),
    "--rmsnorm_plugin": plugin("rmsnorm"),
    "--use_rmsnorm_plugin": plugin("rmsnorm"),
    "--layernorm_plugin": plugin("layernorm"),
    "--use_layernorm_plugin": plugin("layernorm"),
    "--moe_plugin": plugin("moe"),
    "--fp8_rowwise_gemm_plugin": plugin("fp8_rowwise_gemm"),
    "--rmsnorm_quantization_plugin": plugin("rmsnorm_quantization"),
    "--layernorm_quantization_plugin": plugin("layernorm_quantization"),
    "--quantize_per_token_plugin": plugin("quantize_per_token"),
    "--quantize_tensor_plugin": plugin("quantize_per_token"),
    **{
        f"--{name}_plugin": other_plugin()
        for name in (
            "bert_attention", "gemm_swiglu", "gemm_allreduce", "low_latency_gemm_swiglu", "lora",
            "mamba_conv1d", "nccl", "qserve_gemm", "identity",
        )
    },
}  # fmt: skip

SWITCHES: dict[str, Answers] = {
    "--context_fmha": always("attention over a prompt is always one op, which never stores the scores"),
    "--enable_context_fmha": always("attention over a prompt is always one op, which never stores the scores"),
    "--context_fmha_fp32_acc": always("attention always adds up in float32"),
    "--enable_context_fmha_fp32_acc": always("attention always adds up in float32"),
    "--paged_kv_cache": always(_ALWAYS_PAGED),
    "--remove_input_padding": always(_ALWAYS_PACKED),
    "--use_inflight_batching": always("requests always join the running batch"),
    "--use_paged_context_fmha": always("every engine can reuse KV blocks; run has --no_kv_cache_enable_block_reuse"),
    "--use_fp8_context_fmha": switch(Refusal("attention computes in the engine's dtype; leave it out"), SO_ANYWAY),
    "--multiple_profiles": switch(Note("one graph serves every size, and kernels are measured for each"), SO_ANYWAY),
    "--use_fused_mlp": switch(SO_ANYWAY, Means(("--disable_pass", "fuse_gate_up"))),
    "--reduce_fusion": switch(SO_ANYWAY, Means(("--disable_pass", "fuse_reduce_norm"))),
    "--user_buffer": switch(Note("one device has nothing to reduce"), SO_ANYWAY),
    "--use_custom_all_reduce": switch(Note("one device has nothing to reduce"), SO_ANYWAY),
    "--multi_block_mode": switch(Note(_MEASURED), Note(_MEASURED)),
    "--enable_xqa": switch(Note(_MEASURED), Note(_MEASURED)),
    "--streamingllm": switch(Note("any engine can keep sink tokens, with run's --sink_token_length"), SO_ANYWAY),
    "--pp_reduce_scatter": switch(Note("one device has nothing to reduce"), SO_ANYWAY),
}  # fmt: skip

BUILDING: dict[str, Answers] = {
    "--model_config": refused("a model needs its weights; give its folder as --model"),
    "--build_config": refused("limits are given as flags, such as --max_batch_size and --max_seq_len"),
    "--max_beam_width": note("a beam is a sequence like others; run's --num_beams says how many"),
    "--max_prompt_embedding_table_size": refused(_NO_ADAPTERS, unless=("0",)),
    "--opt_num_tokens": note("kernels are measured for each number of rows"),
    "--opt_batch_size": note("kernels are measured for each number of rows"),
    "--kv_cache_type": {"paged": SO_ANYWAY, ANY: Refusal("the KV cache is always paged; leave it out")},
    "--profiling_verbosity": note("an engine's graph and kernels can always be read, with slipstream inspect"),
    "--strip_plan": refused_switch("an engine holds its weights; leave it out"),
    "--weight_sparsity": noted_switch("no kernel makes use of sparse weights"),
    "--weight_streaming": refused_switch("the weights must fit on the device so far; leave it out"),
    "--workers": note(_ONE_PROCESS),
    "--parallel_build": noted_switch(_ONE_PROCESS),
    "--log_level": note(_LEVELS),
    "--enable_debug_output": noted_switch(_LEVELS),
    "--logits_dtype": note("logits are in the engine's dtype, and float32 once they are sampled from"),
    "--gather_context_logits": noted_switch(_PER_REQUEST),
    "--gather_generation_logits": noted_switch(_PER_REQUEST),
    "--gather_all_token_logits": noted_switch(_PER_REQUEST),
    "--lora_dir": refused(_NO_ADAPTERS),
    "--lora_target_modules": refused(_NO_ADAPTERS),
    "--lora_ckpt_source": refused(_NO_ADAPTERS),
    "--max_lora_rank": note("no engine takes adapters yet"),
    "--cluster_key": note("kernels are measured on the device itself"),
    "--builder_opt": note("kernels are measured, at one depth"),
    "--strongly_typed": noted_switch("every value of the graph has its dtype"),
}

CONVERTING: dict[str, Answers] = {
    "--workers": note("one process writes the one weight file"),
    "--device": note("converting computes nothing"),
    "--device_map": note("converting computes nothing"),
    "--log_level": note(_LEVELS),
    "--disable_weight_only_quant_plugin": noted_switch("it matters to quantizing only"),
}

QUANTIZING_ITSELF: dict[str, Answers] = {
    **{
        f"--{name}": note(_IN_THE_BUILD) for name in ("tp_size", "pp_size", "cp_size", "calib_tp_size", "calib_pp_size")
    },
    "--batch_size": note("texts go through a block a few at a time, whose number does not change the result"),
    "--tokenizer_max_seq_length": note("--calib_max_seq_length says it"),
    "--device_map": note("one block is in memory at a time"),
    "--log_level": note(_LEVELS),
    "--nemo_ckpt_path": refused("give a Hugging Face folder as --model_dir"),
    "--decoder_type": note(_FROM_CONFIG),
    **{
        f"--{name}": refused("drafters keep their dtype; leave it out")
        for name in ("num_medusa_heads", "num_medusa_layers", "medusa_model_dir", "medusa_hidden_act")
    },
    "--quant_medusa_head": refused_switch("drafters keep their dtype; leave it out"),
    "--max_draft_len": refused("drafters keep their dtype; leave it out", unless=("0",)),
}

RUNNING: dict[str, Answers] = {
    "--use_py_session": noted_switch("there is one runtime"),
    "--cuda_graph_mode": noted_switch("there is nothing to switch: where recording helps, steps are recorded"),
    "--multi_block_mode": noted_switch(_MEASURED),
    "--enable_context_fmha_fp32_acc": noted_switch("attention always adds up in float32"),
    "--log_level": note(_LEVELS),
    "--debug_mode": noted_switch(_LEVELS),
    "--streaming_interval": note("text is printed as soon as it is there"),
    "--max_input_length": note("prompts are not cut; one that is too long is refused"),
    "--gpu_weights_percent": refused("the weights must fit on the device so far; leave it out", unless=("1", "1.0")),
    "--beam_search_diversity_rate": refused("beams are not pushed apart here; give 0.0", unless=("0", "0.0")),
    "--tokenizer_type": note("the tokenizer's own files say it"),
    "--vocab_file": refused("the tokenizer's folder is given, as --tokenizer_dir"),
    "--no_prompt_template": noted_switch("a prompt is wrapped only with --chat"),
    "--use_prompt_template": refused_switch("--chat wraps the prompt in the model's own template"),
    "--run_profiling": noted_switch("--verbose says where the time went"),
    "--prompt_table_path": refused(_NO_ADAPTERS),
    "--prompt_tasks": refused(_NO_ADAPTERS),
    "--lora_dir": refused(_NO_ADAPTERS),
    "--lora_task_uids": refused(_NO_ADAPTERS),
    "--lora_ckpt_source": refused(_NO_ADAPTERS),
    **{
        f"--output_{name}": refused(_NO_FILES)
        for name in ("csv", "npy", "logits_npy", "log_probs_npy", "cum_log_probs_npy")
    },
}

# TGI's launcher. --max_input_length and --max_total_tokens are names of options of ours.
SERVING: dict[str, Answers] = {
    "--model_id": refused("the model is the first word after serve, as in: slipstream serve MODEL"),
    "--num_shard": {ANY: Reads(lambda value: ("--tp_size", str(int(value))), "N: --tp_size N")},
    "--sharded": refused("--tp_size says over how many processes; leave it out", unless=("false",)),
    "--speculate": {ANY: Reads(lambda value: _ngram(int(value)), f"N: {_NGRAM_OF_N}")},
    "--quantize": {
        **dict.fromkeys(("awq", "gptq", "compressed-tensors"), Note("the model's config.json says it")),
        "fp8": Means(("--quantization", "fp8")),
        "eetq": Means(("--quantization", "int8_wo")),
        ANY: Refusal(_NO_QUANTIZING),
    },
}

# TensorRT-LLM's prepare_dataset.py.
PREPARING: dict[str, Answers] = {
    "--stdout": {BARE: SO_ANYWAY},
    "--trust_remote_code": noted_switch("a tokenizer is read from its files, and no code of theirs is run"),
    "--log_level": note(_LEVELS),
}

# trtllm-bench, and benchmarks/python/benchmark.py.
BENCHING: dict[str, Answers] = {
    "--mode": {"plugin": SO_ANYWAY, ANY: Note(_MEASURED)},
    "--backend": note("there is one runtime"),
    "--streaming": noted_switch("every token is timed as it comes"),
    "--eos_id": refused("answers are as long as the data set says; leave it out", unless=("-1",)),
    "--tp": refused(_BUILT_FOR, unless=("1",)),
    "--pp": refused(_BUILT_FOR, unless=("1",)),
    "--ep": refused(_BUILT_FOR, unless=("1",)),
    "--num_beams": refused("beams are not measured; give 1 or leave it out", unless=("1",)),
    "--beam_width": refused("beams are not measured; give 1 or leave it out", unless=("1",)),
    "--kv_cache_free_gpu_mem_fraction": {
        ANY: Reads(lambda value: ("--kv_cache_free_memory_fraction", str(float(value))),
                   "a part of 1: --kv_cache_free_memory_fraction")
    },
    "--workspace": note("engines are kept in $SLIPSTREAM_CACHE"),
    "--log_level": note(_LEVELS),
}  # fmt: skip

FLAGS: dict[str, dict[str, Answers]] = {
    "convert": QUANTIZING | NOT_ON_LOAD | CONVERTING_RANKS | DRAFTING_BUILD | DESCRIBING | CONVERTING,
    "build": QUANTIZING | ON_LOAD | BUILDING_RANKS | DRAFTING_BUILD | DESCRIBING | PLUGINS | SWITCHES | BUILDING,
    "quantize": QUANTIZING_ITSELF,
    "run": DRAFTING | RUNNING,
    "serve": SERVING,
    "bench prepare-dataset": PREPARING,
    "bench latency": BENCHING,
    "bench throughput": BENCHING,
}


def help_rows(verb: str) -> list[tuple[str, str]]:
    """(flags, what becomes of them): those that are answered alike share a row."""
    rows: dict[str, list[str]] = {}
    for name, answers in FLAGS.get(verb, {}).items():
        texts = [text for value, answer in answers.items() if (text := _help(value, answer))]
        rows.setdefault("; ".join(dict.fromkeys(texts)), []).append(name)
    return [(", ".join(names), text) for text, names in rows.items()]


def _help(value: str, answer: Answer) -> str:
    match answer:
        case Note(why):
            return f"no effect: {why}"
        case Refusal(why):
            return f"refused: {why}"
        case Reads(form=form):
            return form
    return f"{value}: {' '.join(answer.arguments)}" if answer.arguments else ""
