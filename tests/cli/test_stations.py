"""slipstream convert, build and inspect: the stations by hand, and a sentence for each mistake."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from slipstream.checkpoint.random import write_random_model
from slipstream.models import llama
from slipstream.schema.units import human_bytes
from tests.checkpoint.tensorrt_llm import write_as_tensorrt_llm
from tests.cli.conftest import Call


def test_convert_build_inspect_run(call: Call, talker: Path, tmp_path: Path) -> None:
    checkpoint, engine = tmp_path / "checkpoint", tmp_path / "engine"
    done = call("convert", "--model_dir", talker, "--output_dir", checkpoint, "--dtype", "bfloat16")
    assert (done.code, done.err) == (0, "")
    assert done.out == f"{checkpoint}: llama, 30 tensors, {converted_size(checkpoint)} in bfloat16, with tokenizer\n"
    assert (checkpoint / "rank0.safetensors").is_file()

    limits = ("--max_batch_size", 4, "--max_num_tokens", 32, "--max_seq_len", 128, "--tokens_per_block", 8)
    done = call("build", "--checkpoint_dir", checkpoint, "--output_dir", engine, *limits)
    assert done.code == 0, done.err
    assert "at most 4 sequences and 32 tokens a step, 128 tokens a sequence" in done.out
    assert done.out.index("Memory plan") < done.out.index("Passes") < done.out.index("Seconds")
    assert "fuse_qkv" in done.out
    assert done.out.splitlines()[-1].startswith(f"{engine}: ")
    assert {file.name for file in engine.iterdir()} == {"config.json", "rank0.engine", "model.cache", "tokenizer"}

    done = call("inspect", engine)
    assert done.code == 0
    for part in (
        f"{talker.name} (llama, float32)",
        "3 of width 64",
        "one sequence  at most 128 tokens",
        "Passes",
        "Kernels on",
    ):
        assert part in done.out
    done = call("run", "--engine_dir", engine, "--input_text", "Hello", "--max_output_len", 4)
    assert done.out.startswith('Input [Text 0]: "Hello"\nOutput [Text 0 Beam 0]: "')


def test_convert_gives_a_hugging_face_folder_back(call: Call, talker: Path, tmp_path: Path) -> None:
    checkpoint, again = tmp_path / "checkpoint", tmp_path / "hf"
    assert call("convert", "--model_dir", talker, "--output_dir", checkpoint).code == 0
    done = call("convert", "--model_dir", checkpoint, "--output_dir", again, "--output_format", "hf")
    assert (done.code, done.err) == (0, "")
    assert done.out.endswith("in float32, with tokenizer\n")
    assert (again / "model.safetensors").read_bytes()[-4096:] == (talker / "model.safetensors").read_bytes()[-4096:]
    assert (again / "tokenizer.json").read_bytes() == (talker / "tokenizer.json").read_bytes()


@pytest.mark.parametrize("flags", [("--kv_cache_dtype", "fp8"), ("--fp8_kv_cache",)], ids=" ".join)
@pytest.mark.parametrize("verb", ["convert", "build"])
def test_keys_and_values_in_8_bits(call: Call, talker: Path, tmp_path: Path, verb: str, flags: tuple[str, ...]) -> None:
    """Decided when the model is converted, as by quantize.py, or when the engine is built."""
    checkpoint, engine = tmp_path / "checkpoint", tmp_path / "engine"
    call("convert", "--model_dir", talker, "--output_dir", checkpoint, *(flags if verb == "convert" else ()))
    options = flags if verb == "build" else ()
    done = call("build", "--checkpoint_dir", checkpoint, "--output_dir", engine, "--fast_build", *options)
    assert done.code == 0, done.err
    # 3 layers × K and V × 2 heads × 16 wide × 1 byte
    assert re.search(r"KV cache, one token +192 B", done.out)
    assert re.search(r"KV block +16 tokens in fp8", call("inspect", engine).out)
    done = call("run", "--engine_dir", engine, "--input_text", "One two", "--kv_cache_dtype", "float32")
    sentence = (
        f"kv_cache_dtype is 'float32', but the KV cache of {engine} was built in fp8; leave it out or build again."
    )
    assert (done.code, done.err) == (2, f"error: {sentence}\n")


def test_a_warning_is_one_line_without_a_place_in_our_code(tmp_path: Path) -> None:
    published = write_random_model(tmp_path / "published", llama.TINY)
    model = write_as_tensorrt_llm(published, tmp_path / "model", quantization={"quant_algo": "W8A16"})
    command = [sys.executable, "-c", "import slipstream.cli; slipstream.cli.main()", "convert"]
    command += ["--model_dir", str(model), "--output_dir", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"warning: {model} leaves W8A16 to trtllm-build")


def converted_size(checkpoint: Path) -> str:
    from slipstream.checkpoint import open_checkpoint, resolve

    opened = open_checkpoint(resolve(checkpoint))
    return human_bytes(opened.num_bytes)


def test_a_dry_run_writes_nothing(call: Call, talker: Path, tmp_path: Path) -> None:
    output = tmp_path / "engine"
    done = call("build", "--model", talker, "--output_dir", output, "--dry_run", "--max_seq_len", 100)
    assert done.code == 0
    assert "Memory plan" in done.out
    # 3 layers × K and V × 2 heads × 16 wide × 4 bytes
    assert re.search(r"KV cache, one token +768 B", done.out)
    assert re.search(r"KV cache, one sequence of 100 tokens +84\.0 KiB", done.out)  # seven blocks of 16
    assert "What fits on the CPU now" in done.out
    assert re.search(r"--max_num_tokens +2 048 +[\d ]+ +beside", done.out)
    assert not output.exists()


def test_a_dry_run_for_a_named_gpu(call: Call, talker: Path) -> None:
    """The GPU need not be here, and the dtype is the one a GPU would get."""
    done = call("build", "--model", talker, "--dry_run", "--gpu", "h100-80gb")
    assert done.code == 0, done.err
    lines = done.out.partition("What fits on H100-80GB")[2].splitlines()
    starts = (
        "memory",
        "- CUDA",
        "- weights",
        "- activations of 2048",
        "- recorded",
        "= left",
        "× 0.9",
        "÷ 768 B",
        "÷ 256",
    )
    for line, start in zip(lines[1:], starts, strict=False):
        assert line.startswith(start)


def test_a_pass_left_out(call: Call, talker: Path, tmp_path: Path) -> None:
    done = call("build", "--model", talker, "--output_dir", tmp_path / "e", "--disable_pass", "fuse_qkv")
    assert done.code == 0
    assert "fuse_gate_up" in done.out
    assert "fuse_qkv" not in done.out


def test_parts_of_inspect(call: Call, engine: Path) -> None:
    graph = call("inspect", engine, "--graph").out
    assert graph.startswith("step.token_ids: int64[T]")
    assert graph.splitlines()[-1].startswith("return linear")
    assert call("inspect", engine, "--graph", "--after").out == graph
    captured = call("inspect", engine, "--graph", "--before").out
    assert " = rope(" in captured
    assert " = rope(" not in graph
    memory = call("inspect", engine, "--memory").out
    assert memory.startswith("Memory plan")
    assert "KV cache of a start now" in memory
    assert "Passes" not in memory


def test_the_passes_say_how_many_ops_each_removed(call: Call, engine: Path) -> None:
    out = call("inspect", engine).out
    assert re.search(r"pass +matches +ops removed +ops left +benefit", out)
    # three layers: q, k and v by one product that is split (4 ops for 3, and the join of their weights is folded later)
    assert re.search(r"fuse_rope_kv_write +3 +6 ", out)
    assert re.search(r"fuse_add_norm +6 +6 ", out)
    assert re.search(r"last_token +1 +-1 ", out)


def test_a_graph_is_drawn(call: Call, engine: Path, talker: Path, tmp_path: Path) -> None:
    assert call("inspect", engine, "--svg", tmp_path / "after.svg").out == ""
    assert call("inspect", engine, "--svg", tmp_path / "before.svg", "--before").code == 0
    for name, ops in (("after", "35 ops, 15 drawn"), ("before", "55 ops, 21 drawn")):
        drawing = (tmp_path / f"{name}.svg").read_text(encoding="utf-8")
        assert f">{ops}<" in drawing
        assert "×3<" in drawing
    assert call("build", "--model", talker, "--output_dir", tmp_path / "e", "--visualize_network").code == 0
    assert (tmp_path / "e" / "graph.svg").read_text(encoding="utf-8").startswith("<svg ")


def test_kernels_of_another_machine(call: Call, engine: Path, tmp_path: Path) -> None:
    copy = tmp_path / "engine"
    shutil.copytree(engine, copy)
    choices = json.loads((copy / "model.cache").read_text(encoding="utf-8"))
    (copy / "model.cache").write_text(json.dumps(choices | {"device": "another"}), encoding="utf-8")
    assert "Kernels: not measured on" in call("inspect", copy).out


MISTAKES = [
    (["build", "--model", "{talker}"], "There is no --output_dir"),
    (["build", "--model", "{talker}", "--output_dir", ""], "There is no --output_dir"),
    (["build", "--dry_run", "--model", "{talker}", "--disable_plugin", "x"], "no plugin to disable is called 'x'"),
    (["build", "--output_dir", "{empty}/x"], "There is no model"),
    (["build", "--output_dir", "{empty}/x", "--model", "a", "--checkpoint_dir", "b"], "both given"),
    (["build", "--output_dir", "{empty}/x", "--checkpoint_dir", "nowhere"], "nowhere is not a folder"),
    (["build", "--output_dir", "{empty}/x", "--checkpoint_dir", "{talker}"], "is no checkpoint; give it as --model"),
    (["build", "--output_dir", "{empty}/x", "--model", "{engine}"], "is an engine already"),
    (["build", "--output_dir", "{talker}", "--model", "{talker}"], "is not empty and holds no slipstream-engine"),
    (["build", "--output_dir", "{talker}/config.json", "--model", "{talker}"], "config.json"),
    (["build", "--dry_run", "--model", "{talker}", "--disable_pass", "fuse"], "no pass to disable is called 'fuse'"),
    (
        ["build", "--dry_run", "--model", "{talker}", "--pass", "nowhere:PASS"],
        "The module 'nowhere' cannot be imported",
    ),
    (["build", "--dry_run", "--model", "{talker}", "--pass", "fuse_all"], "offers a pass called 'fuse_all'"),
    (["inspect", "{engine}", "--graph", "--before", "--after"], "--before and --after were both given"),
    (["inspect", "{engine}", "--before"], "--before and --after say which graph"),
    (["inspect", "{engine}", "--svg", "{empty}/no/x.svg"], "x.svg cannot be written (No such file or directory)"),
    (["inspect", "{engine}", "--plugin", "nowhere"], "The module 'nowhere' cannot be imported"),
    (["build", "--dry_run", "--model", "{talker}", "--max_seq_len", "9999"], "max_seq_len is 9999"),
    (["build", "--dry_run", "--model", "{talker}", "--max_num_tokens", "3"], "max_num_tokens is 3"),
    (["build", "--dry_run", "--model", "{talker}", "--gpu", "H101"], "--gpu is 'H101'; the known ones are T4"),
    (["build", "--output_dir", "{empty}/x", "--model", "{talker}", "--gpu", "H100-80GB"], "only --dry_run does"),
    (["build", "--dry_run", "--model", "{talker}", "--dtype", "fp7"], "dtype is 'fp7'"),
    (["build", "--dry_run", "--model", "{talker}", "--device", "cuda:9"], "device is 'cuda:9'"),
    (["convert", "--model_dir", "./nowhere", "--output_dir", "{empty}/x"], "No such folder or file"),
    (["convert", "--model_dir", "{empty}", "--output_dir", "{empty}/x"], "holds no config.json"),
    (["convert", "--model_dir", "{talker}", "--output_dir", "{talker}"], "give another --output_dir"),
    (["convert", "--model_dir", "{talker}", "--output_dir", "{engine}"], "holds no slipstream-checkpoint"),
    (["convert", "--model_dir", "{talker}", "--output_dir", "{empty}/x", "--dtype", "x"], "dtype is 'x'"),
    (["convert", "--model_dir", "{talker}", "--output_dir", ""], "--output_dir is empty"),
    (["convert", "--output_dir", "{empty}/x"], "Missing option '--model_dir'"),
    (["inspect", "./nowhere"], "nowhere is not a folder"),
    (["inspect", "{empty}"], "is not an engine folder"),
    (["inspect", "{talker}"], "is a model, not an engine"),
    (["inspect", "{engine}", "--device", "x"], "device is 'x'"),
]


@pytest.mark.parametrize(("arguments", "sentence"), MISTAKES, ids=[" ".join(arguments) for arguments, _ in MISTAKES])
def test_a_mistake_is_one_sentence(
    arguments: list[str], sentence: str, call: Call, engine: Path, talker: Path, tmp_path: Path
) -> None:
    for name, path in {"{engine}": engine, "{talker}": talker, "{empty}": tmp_path}.items():
        arguments = [argument.replace(name, str(path)) for argument in arguments]
    done = call(*arguments)
    assert done.code == 2, done
    assert sentence in done.err
    assert "Traceback" not in done.err
    if "Usage:" not in done.err:
        assert done.err.startswith("error: ")
        assert done.err.count("\n") == 1


def test_a_broken_engine_is_a_sentence(call: Call, engine: Path, tmp_path: Path) -> None:
    copy = tmp_path / "engine"
    shutil.copytree(engine, copy)
    (copy / "rank0.engine").write_bytes((engine / "rank0.engine").read_bytes()[:-100])
    for verb in (["inspect", copy], ["run", "--engine_dir", copy, "--input_text", "a"]):
        done = call(*verb)
        assert done.code == 2
        assert done.err.startswith("error: ")
        assert done.err.count("\n") == 1


def test_human_bytes() -> None:
    assert [human_bytes(n) for n in (0, 1023, 1024, 1536, 5 << 20, 3 << 50)] == [
        "0 B", "1023 B", "1.0 KiB", "1.5 KiB", "5.0 MiB", "3072.0 TiB",
    ]  # fmt: skip
