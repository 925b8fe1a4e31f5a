"""TensorRT-LLM's flags: each does what it meant, or says in one line why it does nothing, or is refused in one."""

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer.main

from slipstream.cli._app import make_app
from slipstream.cli._arguments import OwnOptions, answer_seed_flags
from slipstream.cli._seed_flags import FLAGS, help_rows
from slipstream.engine.folder import open_engine
from slipstream.errors import UsageError
from tests.cli.conftest import Call

# The field guide, §1.3 to §1.6 and §2.13.
SEEDS = {
    "convert": """
        model_dir dtype qformat kv_cache_dtype output_dir calib_size tp_size pp_size cp_size model_version
        use_weight_only calib_dataset calib_max_seq_length batch_size awq_block_size seed device device_map
        quantize_lm_head num_medusa_heads max_draft_len autoq_format auto_quantize_bits
    """,
    "build": """
        checkpoint_dir output_dir model_config build_config model_cls_file model_cls_name
        max_batch_size max_input_len
        max_seq_len max_beam_width max_num_tokens opt_num_tokens kv_cache_type input_timing_cache output_timing_cache
        profiling_verbosity strip_plan weight_sparsity weight_streaming fast_build workers log_level visualize_network
        dry_run monitor_memory logits_dtype gather_context_logits gather_generation_logits gather_all_token_logits
        lora_dir lora_target_modules max_lora_rank speculative_decoding_mode max_draft_len auto_parallel
        bert_attention_plugin gpt_attention_plugin gemm_plugin low_latency_gemm_plugin smooth_quant_gemm_plugin
        layernorm_quantization_plugin rmsnorm_quantization_plugin nccl_plugin lookup_plugin lora_plugin
        weight_only_groupwise_quant_matmul_plugin weight_only_quant_matmul_plugin quantize_per_token_plugin
        quantize_tensor_plugin moe_plugin mamba_conv1d_plugin context_fmha paged_kv_cache remove_input_padding
        use_custom_all_reduce multi_block_mode enable_xqa tokens_per_block use_paged_context_fmha use_fp8_context_fmha
        multiple_profiles streamingllm reduce_fusion use_fused_mlp
        model_version model_dir dtype use_weight_only use_gemm_plugin use_gpt_attention_plugin
    """,
    "run": """
        engine_dir draft_engine_dir tokenizer_dir draft_target_model_config kv_cache_free_gpu_memory_fraction
        max_attention_window_size sink_token_length
        kv_cache_enable_block_reuse max_output_len multi_block_mode input_text input_file end_id num_beams
        num_return_sequences temperature top_k top_p length_penalty repetition_penalty presence_penalty
        frequency_penalty beam_search_diversity_rate random_seed early_stopping no_repeat_ngram_size stop_words
        bad_words streaming streaming_interval prompt_table_path lora_dir lora_task_uids cuda_graph_mode use_py_session
        prompt_lookup_config medusa_choices eagle_choices lookahead_config
    """,
    "quantize": """
        model_dir dtype qformat kv_cache_dtype output_dir calib_size tp_size
    """,
    "serve": """
        model_id max_input_length max_total_tokens max_concurrent_requests speculate quantize num_shard dtype
    """,
}


def own_options(verb: str) -> set[str]:
    command: Any = typer.main.get_command(make_app([verb]))
    for word in verb.split():
        command = command.commands[word]
    return {name for option in command.params for name in option.opts}


@pytest.mark.parametrize("verb", SEEDS)
def test_every_flag_of_the_seeds_is_known(verb: str) -> None:
    own = own_options(verb)
    for name in SEEDS[verb].split():
        assert (f"--{name}" in own) != (f"--{name}" in FLAGS[verb]), f"{verb} --{name}: in one of the two places"


@pytest.mark.parametrize("verb", FLAGS)
def test_no_flag_is_both_ours_and_in_the_table(verb: str) -> None:
    assert not own_options(verb) & set(FLAGS[verb])


OWN = OwnOptions(switches=("--dry_run",), single=("--model",), repeatable=("--input_text", "--disable_plugin"))


def answered(*arguments: str) -> list[str]:
    return answer_seed_flags("build", arguments, OWN)


def test_options_of_ours_pass_as_they_are() -> None:
    for line in ("--model m --dry_run x", "--model=m", "--model --workers", "-h", "-- --workers 3"):
        assert answered(*line.split()) == line.split()


def test_a_repeatable_option_takes_several_values() -> None:
    assert answered("--input_text", "a", "b", "--dry_run") == ["--input_text", "a", "--input_text", "b", "--dry_run"]


def test_a_note_names_all_it_is_said_of(capsys: pytest.CaptureFixture[str]) -> None:
    assert answered("--gemm_plugin=fp8", "--workers", "1", "--gpt-attention-plugin", "float16") == []
    first, second = capsys.readouterr().err.splitlines()
    assert first.startswith(
        "note: no effect: --gemm_plugin fp8, --gpt_attention_plugin float16: each op gets the kernel"
    )
    assert second == "note: no effect: --workers 1: one process builds the one engine file."


@pytest.mark.parametrize("line", ["--use_paged_context_fmha=enable", "--remove_input_padding", "--cp_size 1",
                                  "--kv_cache_type paged", "--qformat full_prec", "--use_gemm_plugin"])  # fmt: skip
def test_what_is_so_anyway_is_silent(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert answered(*line.split()) == []
    assert capsys.readouterr().err == ""


def test_flags_that_mean_options_of_ours() -> None:
    assert answered("--gemm_plugin", "disable") == ["--disable_plugin", "gemm"]
    assert answered("--rmsnorm_quantization_plugin=disable") == ["--disable_plugin", "rmsnorm_quantization"]
    assert answered("--use_fused_mlp", "disable") == ["--disable_pass", "fuse_gate_up"]
    assert answered("--use_weight_only") == ["--quantization", "int8_wo"]
    assert answered("--weight_only_precision", "int4") == ["--quantization", "int4_wo"]


def test_flags_whose_value_becomes_an_option_of_ours() -> None:
    own = OwnOptions(switches=(), single=("--speculative",), repeatable=())
    drafting = ["--speculative", '{"method": "ngram", "max_draft_len": 7}']
    assert answer_seed_flags("run", ["--prompt_lookup_config", "[7,2,[0]]"], own) == drafting
    assert answer_seed_flags("serve", ["--speculate", "7"], own) == drafting
    assert answer_seed_flags("serve", ["--speculate=0"], own) == []
    flags = ["--draft_engine_dir", "./draft-engine", "--draft_target_model_config", "[10,[0,1],[0,1],False]"]
    drafting = {"method": "draft_model", "model": "./draft-engine", "max_draft_len": 10}
    for order in (flags, flags[2:] + flags[:2]):
        name, value = answer_seed_flags("run", order, own)
        assert (name, json.loads(value)) == ("--speculative", drafting)
    given = ["--speculative", '{"method": "eagle", "model": "F"}', "--eagle_choices", "[[0], [0, 0]]"]
    name, value = answer_seed_flags("run", given, own)
    assert json.loads(value) == {"method": "eagle", "model": "F", "choices": "[[0], [0, 0]]"}
    for mode in ("draft_tokens_external", "medusa", "lookahead_decoding", "explicit_draft_tokens", "eagle"):
        assert answered("--speculative_decoding_mode", mode) == []
    drafting = ["--speculative", '{"method": "lookahead", "window": 7, "ngram": 5, "guesses": 7}']
    assert answer_seed_flags("run", ["--lookahead_config", "[7,5,7]"], own) == drafting
    assert answer_seed_flags("run", ["--lookahead_config=[1,1,0]"], own) == []
    for wrong in ("[7,5]", "7", "[7,5,"):
        with pytest.raises(UsageError, match=rf"--lookahead_config is '{re.escape(wrong)}'; it must be \[W, N, G\]\."):
            answer_seed_flags("run", ["--lookahead_config", wrong], own)
    with pytest.raises(UsageError, match=r"--medusa_choices is '\[\[0'; it must be \[\[0\], \[0, 0\], \.\.\.\]\."):
        answer_seed_flags("run", ["--medusa_choices", "[[0"], own)
    with pytest.raises(UsageError, match=r"it must be \[N, \[DEVICES\], \[DEVICES\], LOGITS\]\."):
        answer_seed_flags("run", ["--draft_target_model_config", "[4]"], own)
    for verb, flag, value in (("serve", "--speculate", "some"), ("run", "--prompt_lookup_config", "7")):
        with pytest.raises(UsageError, match=rf"{flag} is '{value}'; it must be (N|\[N, LONGEST, \[DEVICES\]\])\."):
            answer_seed_flags(verb, [flag, value], own)


@pytest.mark.parametrize(("line", "sentence"), [
    ("--qformat fp8", "--qformat fp8 is refused: slipstream quantize does that"),
    ("--cp_size 2", "--cp_size 2 is refused: ranks share the model by --tp_size, --pp_size and --moe_ep_size"),
    ("--weight_only_precision int2", "--weight_only_precision int2 is refused: slipstream quantize does that"),
    ("--speculative_decoding_mode=telepathy", "drafts are of n-grams, lookahead's window, a draft model or heads of"),
    ("--use_fused_mlp maybe", "--use_fused_mlp is 'maybe'; it must be enable or disable."),
    ("--gemm_plugin int7", "--gemm_plugin is 'int7'; it must be enable or disable or"),
    ("--strip_plan=yes", "--strip_plan is 'yes'; it must be given without a value."),
    ("--workers", "--workers has no value"),
    ("--work 3", "There is no option --work; did you mean --workers?"),
    ("--zzzzz", "There is no option --zzzzz; --help lists"),
    ("--draft_target_model_config = [4]", "is followed by a lone =; write --draft_target_model_config=VALUE"),
])  # fmt: skip
def test_what_is_refused(line: str, sentence: str) -> None:
    with pytest.raises(UsageError) as error:
        answered(*line.split())
    assert sentence in str(error.value)
    assert str(error.value)[-1] in ".?"


@pytest.mark.parametrize("verb", FLAGS)
def test_the_help_shows_every_row(verb: str, call: Call) -> None:
    shown = call(*verb.split(), "--help").out
    assert "Flags of other tools" in shown
    assert {name for names, _ in help_rows(verb) for name in names.split(", ")} == set(FLAGS[verb])
    assert all(name in shown for name in FLAGS[verb])


def test_plugins_are_in_the_manifest_and_in_the_choices(call: Call, talker: Path, tmp_path: Path) -> None:
    """`--gemm_plugin disable` computes by the reference, wherever the engine is opened."""
    flags = shlex.split("--gpt_attention_plugin float16 --gemm_plugin=disable --max_batch_size 2 --fast_build")
    done = call("build", "--model_dir", talker, "--output_dir", tmp_path / "engine", *flags, "--monitor_memory")
    assert done.code == 0, done.err
    assert done.out.splitlines()[-1].startswith("at most ")
    engine = open_engine(tmp_path / "engine")
    assert engine.manifest.plugins["gemm"] == "disabled"
    assert engine.manifest.plugins["gpt_attention"] == "measured"
    kernels = json.loads((tmp_path / "engine" / "model.cache").read_text())["kernels"]
    assert kernels
    assert all(key.startswith("linear(") and set(names) == {"reference"} for key, names in kernels.items())
    engine.close()
    done = call("run", "--engine_dir", tmp_path / "engine", "--input_text", "Hello", "--max_output_len", 2)
    assert done.code == 0, done.err


def test_timing_caches(call: Call, talker: Path, tmp_path: Path) -> None:
    """What --output_timing_cache wrote is taken over by --input_timing_cache, and what is none is noted."""
    stored = tmp_path / "timing.cache"
    build = ("build", "--model", talker, "--max_batch_size", 2, "--max_num_tokens", 8)
    done = call(*build, "--output_dir", tmp_path / "first", "--output_timing_cache", stored)
    assert (done.code, done.err) == (0, "")
    values = json.loads(stored.read_text())
    for names in values["kernels"].values():
        names[:] = ["reference"] * len(names)
    stored.write_text(json.dumps(values))
    done = call(*build, "--output_dir", tmp_path / "second", "--input_timing_cache", stored)
    assert (done.code, done.err) == (0, "")
    assert json.loads((tmp_path / "second" / "model.cache").read_text()) == values
    done = call(*build, "--output_dir", tmp_path / "third", "--input_timing_cache", tmp_path / "none")
    assert done.code == 0
    assert "holds no choices" in done.err
    done = call(*build, "--output_dir", tmp_path / "fourth", "--output_timing_cache", tmp_path / "no" / "folder")
    assert done.code == 2
    assert "cannot be written" in done.err


def test_input_and_output_length_make_the_sequence(call: Call, talker: Path) -> None:
    dry_run = ("build", "--model", talker, "--dry_run")
    assert "100 tokens a sequence" in call(*dry_run, "--max_input_len", 60, "--max_output_len", 40).out
    done = call(*dry_run, "--max_input_len", 60, "--max_seq_len", 90)
    assert "90 tokens a sequence" in done.out
    assert done.err.startswith("note: no effect: --max_input_len")


def test_a_prompt_with_its_own_first_token(call: Call, engine: Path) -> None:
    done = call(
        "run", "--engine_dir", engine, "--input_text", "Hello", "--max_output_len", 2, "--no_add_special_tokens"
    )
    assert done.code == 0, done.err
    assert done.out.startswith('Input [Text 0]: "Hello"\n')
