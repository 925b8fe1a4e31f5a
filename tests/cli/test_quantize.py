"""slipstream quantize: what it writes, prints and refuses."""

import json
import shutil
from pathlib import Path

import pytest

from slipstream.checkpoint.random import write_random_model
from slipstream.models import llama
from tests.cli.conftest import Call
from tests.cli.test_migrating import write_model

SHORT = ("--calib_size", "4", "--calib_max_seq_length", "16")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("quantize") / "talker"
    write_model(folder, llama.TINY | {"vocab_size": 320})
    return folder


def test_a_checkpoint_with_its_report(call: Call, model: Path, tmp_path: Path) -> None:
    made = tmp_path / "made"
    done = call("quantize", "--model_dir", str(model), "--output_dir", str(made), "--qformat", "int4_awq",
                "--awq_block_size", "32",
                "--exclude_modules", "layers.0", "--kv_cache_dtype", "int8", *SHORT)  # fmt: skip
    assert done.code == 0, done.err
    report = json.loads((made / "quantization_report.json").read_text())
    assert report["settings"]["qformat"] == "int4_awq" and report["text"]["calibration"] == 4
    quality = report["quality"]
    assert quality["tokens"] == 16 * 15 and 0 < quality["kl_nats"] < 1
    for shown in (f"{quality['perplexity']:.3f}", f"{quality['kl_nats']:.4f}", "240 tokens that were held out"):
        assert shown in done.out
        assert shown in (made / "README.md").read_text()
    description = json.loads((made / "config.json").read_text())
    assert description["kv_dtype"] == "int8"
    assert {name.split(".")[1] for name in description["formats"]} == {"1", "2"}
    answer = call("run", "--model", str(made), "--input_text", "hello", "--max_output_len", "3")
    assert answer.code == 0, answer.err


@pytest.mark.parametrize(("qformat", "is_slow"), [("fp8", True), ("int8_wo", False)])
def test_the_report_says_what_no_kernel_here_multiplies(
    qformat: str, is_slow: bool, call: Call, model: Path, tmp_path: Path
) -> None:
    made = tmp_path / "made"
    done = call("quantize", "--model_dir", str(model), "--output_dir", str(made), "--qformat", qformat, *SHORT)
    assert done.code == 0, done.err
    for shown in (done.out, (made / "README.md").read_text()):
        assert ("slow here" in shown) == is_slow
    report = json.loads((made / "quantization_report.json").read_text())
    assert report["device"] == "cpu" and report["widened"] == (["fp8"] if is_slow else [])


@pytest.mark.parametrize("export", ["slipstream", "hf"])
def test_the_same_seed_gives_the_same_bytes(call: Call, model: Path, tmp_path: Path, export: str) -> None:
    found = []
    for name, seed in (("one", "3"), ("two", "3"), ("other", "4")):
        done = call("quantize", "--model_dir", str(model), "--output_dir", str(tmp_path / name),
                    "--qformat", "int4_gptq", "--awq_block_size", "32", "--random_seed", seed,
                    "--export_format", export, *SHORT)  # fmt: skip
        assert done.code == 0, done.err
        (weights,) = (tmp_path / name).glob("*.safetensors")
        found.append(weights.read_bytes())
    assert found[0] == found[1]
    assert found[0] != found[2]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--qformat", "int3"), "qformat is 'int3'; it must be full_prec, fp8,"),
        (("--awq_block_size", "48"), "groups of 48 are not supported; give 32, 64, 128."),
        (("--calib_size", "0"), "qformat int4_awq needs text to calibrate with; give a --calib_size above 0."),
        (
            ("--calib_size", "100000"),
            "and 100016 are needed; give a longer --calib_dataset, or a smaller --calib_size.",
        ),
        (("--calib_dataset", "cnn_dailymail"), "--calib_dataset cnn_dailymail cannot be read"),
        (("--exclude_modules", "layers.7"), "--exclude_modules 'layers.7' fits no weight of this model, such as"),
        (("--export_format", "onnx"), "--export_format is 'onnx'; it must be slipstream or hf."),
        (("--kv_cache_dtype", "int4"), "kv_cache_dtype is 'int4'; for"),
        (
            ("--qformat", "full_prec", "--kv_cache_dtype", "int8", "--calib_size", "0"),
            "A KV cache in int8 needs text to calibrate with; give a --calib_size above 0,",
        ),
        (("--qformat", "fp8", "--awq_block_size", "64"), "leave it out with --qformat fp8, or give int4_awq."),
        (("--auto_quantize_bits", "nan"), "--auto_quantize_bits is nan, but the smallest format takes"),
        (("--auto_quantize_bits", "2"), "--auto_quantize_bits is 2.0, but the smallest format takes"),
        (("--device", "cuda:9"), "device is 'cuda:9'; this machine has"),
        (("--output_dir", ""), "--output_dir is empty; give a folder"),
        (("--medusa_model_dir", "x"), "drafters keep their dtype"),
    ],
)
def test_mistakes_end_in_a_sentence(
    call: Call, model: Path, tmp_path: Path, arguments: tuple[str, ...], sentence: str
) -> None:
    made = tmp_path / "made"
    done = call("quantize", "--model_dir", str(model), "--output_dir", str(made), *arguments)
    assert done.code != 0
    assert sentence in " ".join(done.err.split())
    assert "Traceback" not in done.err and not made.exists()


def test_a_folder_that_is_in_use_is_left_alone(call: Call, model: Path, tmp_path: Path) -> None:
    done = call("quantize", "--model_dir", str(model), "--output_dir", str(model), "--qformat", "int8_wo", *SHORT)
    assert done.code != 0 and "is the model to quantize itself; give another --output_dir." in " ".join(
        done.err.split()
    )
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("all of it")
    done = call("quantize", "--model_dir", str(model), "--output_dir", str(tmp_path / "mine"), "--qformat", "int8_wo")
    assert done.code != 0 and (tmp_path / "mine" / "thesis.txt").read_text() == "all of it"


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(call: Call, tmp_path: Path) -> None:
    write_model(tmp_path / "model", llama.TINY | {"vocab_size": 320})
    write_random_model(tmp_path / "small", llama.TINY | {"vocab_size": 100})
    for file in (tmp_path / "model").glob("tokenizer*"):
        shutil.copy(file, tmp_path / "small")
    options = ("--model_dir", str(tmp_path / "small"), "--output_dir", str(tmp_path / "made"), "--qformat", "int8_wo")
    done = call("quantize", *options, *SHORT)
    said = " ".join(done.err.split())
    assert done.code == 2 and "and the model has tokens 0 to 99; give the folder a tokenizer.json that fits" in said


@pytest.mark.parametrize(("qformat", "method"), [("int4_awq", "awq"), ("int4_gptq", "gptq")])
def test_folders_for_other_engines(call: Call, model: Path, tmp_path: Path, qformat: str, method: str) -> None:
    arguments = ("--model_dir", str(model), "--qformat", qformat, "--awq_block_size", "32", *SHORT)
    for name, export in (("ours", "slipstream"), ("theirs", "hf")):
        done = call("quantize", "--output_dir", str(tmp_path / name), "--export_format", export, *arguments)
        assert done.code == 0, done.err
    config = json.loads((tmp_path / "theirs" / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == method
    answers = [call("run", "--model", str(tmp_path / name), "--input_text", "hello", "--max_output_len", "8").out
               for name in ("ours", "theirs")]  # fmt: skip
    assert answers[0] == answers[1]
    done = call("quantize", "--output_dir", str(tmp_path / "theirs"), "--export_format", "hf", *arguments)
    assert done.code != 0 and "is not empty" in done.err


def test_texts_of_ones_own(call: Call, model: Path, tmp_path: Path) -> None:
    (tmp_path / "own.jsonl").write_text("".join(json.dumps({"text": f"line {n} " * 40}) + "\n" for n in range(40)))
    done = call("quantize", "--model_dir", str(model), "--output_dir", str(tmp_path / "made"), "--qformat", "int8_sq",
                "--calib_dataset", str(tmp_path / "own.jsonl"), *SHORT)  # fmt: skip
    assert done.code == 0, done.err
    (tmp_path / "bad.jsonl").write_text('{"text": "fine"}\n{"words": 1}\n')
    done = call("quantize", "--model_dir", str(model), "--output_dir", str(tmp_path / "no"), "--qformat", "int8_sq",
                "--calib_dataset", str(tmp_path / "bad.jsonl"), *SHORT)  # fmt: skip
    assert done.code != 0 and 'bad.jsonl:2: a line must be like {"text": "..."}.' in " ".join(done.err.split())


def test_two_models_are_compared(call: Call, model: Path, tmp_path: Path) -> None:
    made, numbers = tmp_path / "made", tmp_path / "numbers.json"
    call("quantize", "--model_dir", str(model), "--output_dir", str(made), "--qformat", "int8_wo", *SHORT)
    done = call("eval", "--model_dir", str(made), "--reference_dir", str(model), "--eval_size", "6",
                "--max_seq_length", "16", "--output_file", str(numbers))  # fmt: skip
    assert done.code == 0, done.err
    quality = json.loads(numbers.read_text())["quality"]
    assert quality["tokens"] == 6 * 15 and 0 < quality["kl_nats"] < 0.1
    assert f"{quality['kl_nats']:.4f} nats a token" in done.out
    done = call("eval", "--model_dir", str(made), "--reference_dir", str(tmp_path / "nothing"))
    assert done.code != 0 and "No such folder or file" in done.err
