"""quantize(): what it writes is read, built and run; a killed run goes on; what cannot be is refused in a sentence."""

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from slipstream import LLM, SamplingParams
from slipstream.checkpoint import open_checkpoint, resolve
from slipstream.checkpoint.folder import Checkpoint
from slipstream.checkpoint.random import write_random_model
from slipstream.errors import CapacityError, ModelError, UnsupportedModel
from slipstream.kernels.linear.parts import dense_weight
from slipstream.models import gemma2, llama, qwen3_moe
from slipstream.quantize import apply
from slipstream.quantize.apply import Settings, quantize_model
from slipstream.quantize.compare import compare
from slipstream.quantize.qformats import QFORMATS
from slipstream.quantize.texts import Texts


def texts_of(checkpoint: Checkpoint, num_calibration: int = 6) -> Texts:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 100, (num_calibration + 4, 24), generator=generator)
    return Texts(ids[4:], ids[:4], "random")


GREEDY = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("quantize") / "llama"
    write_random_model(folder, llama.TINY)
    return folder


@pytest.mark.parametrize("qformat", [name for name in QFORMATS if name != "full_prec"])
def test_what_is_written_runs(model: Path, qformat: str, tmp_path: Path) -> None:
    """The quality that was printed is the engine's: its tokens are those of the numbers in the checkpoint."""
    result = quantize_model(model, tmp_path / "made", texts_of, Settings(qformat=qformat, group_size=32))
    summary = result.quality.summary()
    assert result.num_bytes < 0.75 * result.reference_num_bytes
    assert 0 < summary["kl_nats"] < 0.5
    assert not (tmp_path / "made.partial").exists()
    checkpoint = open_checkpoint(resolve(tmp_path / "made"))
    packed = [name for name in checkpoint.formats if "lm_head" not in name]
    assert len(packed) == 7 * checkpoint.config.num_layers
    checkpoint.close()
    with LLM(tmp_path / "made", dtype="float32") as llm:
        (output,) = llm.generate([[5, 6, 7]], GREEDY)
    assert len(output.outputs[0].token_ids) == 4


@pytest.mark.parametrize("architecture", [gemma2, qwen3_moe], ids=["gemma2", "qwen3_moe"])
@pytest.mark.parametrize("qformat", ["int4_awq", "int8_sq", "int4_gptq"])
def test_other_architectures(architecture: object, qformat: str, tmp_path: Path) -> None:
    write_random_model(tmp_path / "model", architecture.TINY)  # type: ignore[attr-defined]
    result = quantize_model(tmp_path / "model", tmp_path / "made", texts_of, Settings(qformat=qformat, group_size=32))
    assert 0 < result.quality.summary()["kl_nats"] < 0.5


def test_scales_that_move_leave_the_model_as_it_was(model: Path, tmp_path: Path) -> None:
    """What AWQ takes from a column of a weight, the norm before it gives."""
    quantize_model(model, tmp_path / "made", texts_of, Settings(qformat="int4_awq", group_size=32), dtype="float32")
    before, after = (open_checkpoint(resolve(path), "float32") for path in (model, tmp_path / "made"))
    moved = 0
    for layer in range(before.config.num_layers):
        norm, weight = f"layers.{layer}.input_norm.weight", f"layers.{layer}.attention.q_proj.weight"
        scale_K = before.read(norm) / after.read(norm)
        moved += int(not torch.allclose(scale_K, torch.ones_like(scale_K)))
        error = (after.read(weight) / scale_K - before.read(weight)).norm() / before.read(weight).norm()
        assert error < 0.2
    assert moved


def test_keys_and_values_have_a_scale_a_head(model: Path, tmp_path: Path) -> None:
    settings = Settings(qformat="int8_wo", kv_cache_dtype="int8")
    quantize_model(model, tmp_path / "made", texts_of, settings)
    checkpoint = open_checkpoint(resolve(tmp_path / "made"))
    assert checkpoint.kv_cache.dtype == "int8"
    assert {tuple(scales.shape) for scales in checkpoint.kv_cache.scales.values()} == {(2, 2)}
    assert len(checkpoint.kv_cache.scales) == checkpoint.config.num_layers
    checkpoint.close()


def test_layers_that_are_left_out_of_the_cache_in_8_bits(model: Path, tmp_path: Path) -> None:
    settings = Settings(qformat="full_prec", kv_cache_dtype="int8", kv_skip_layers=(1,))
    quantize_model(model, tmp_path / "made", texts_of, settings)
    checkpoint = open_checkpoint(resolve(tmp_path / "made"))
    assert sorted(checkpoint.kv_cache.scales) == [0, 2]
    checkpoint.close()
    with LLM(tmp_path / "made", dtype="float32") as llm:
        assert [llm.manifest.kv_dtype_of(layer) for layer in range(3)] == ["int8", "float32", "int8"]
        groups, tokens = llm.manifest.kv_groups, llm.manifest.tokens_per_block
        assert llm.manifest.kv_block_bytes(groups) == (1 + 4 + 1) * tokens * 2 * 2 * 16  # planes, heads, numbers
        llm.generate([[5, 6, 7]], GREEDY)
    with pytest.raises(CapacityError, match=r"Layers 0, 1, 2 of .* only some of them are left out of the KV cache"):
        LLM(tmp_path / "made", dtype="float32", max_attention_window_size=[16, 256, 256])
    with pytest.raises(UnsupportedModel, match="one dtype for the KV cache of all layers"):
        quantize_model(model, tmp_path / "hf", texts_of, settings, export_format="hf")


class Killed(BaseException):
    pass


def test_a_killed_run_goes_on_and_writes_the_same_bytes(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = Settings(qformat="int4_gptq", group_size=32)
    quantize_model(model, tmp_path / "whole", texts_of, settings)
    done: list[int] = []
    run = apply.BlockQuantizer.run

    def killed_at_the_third(self: apply.BlockQuantizer, block: apply.Block, weights: dict[str, torch.Tensor]) -> object:
        if block.layer == 1 and len(done) < 3:
            raise Killed
        done.append(block.layer)
        return run(self, block, weights)

    monkeypatch.setattr(apply.BlockQuantizer, "run", killed_at_the_third)
    with pytest.raises(Killed):
        quantize_model(model, tmp_path / "made", texts_of, settings)
    assert done == [-1, 0]
    done += [9]
    quantize_model(model, tmp_path / "made", texts_of, settings)
    assert done == [-1, 0, 9, 1, 2, 3]
    first, second = ((tmp_path / name / "rank0.safetensors").read_bytes() for name in ("whole", "made"))
    assert first == second


KILLED = """
import os, signal, sys
from slipstream.quantize import apply
from tests.quantize.test_apply import texts_of

def killed_at_the_second_layer(self, index, found):
    if index == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    save(self, index, found)

save, apply.WorkFolder.save = apply.WorkFolder.save, killed_at_the_second_layer
settings = apply.Settings(qformat="int4_awq", group_size=32, kv_cache_dtype="fp8")
apply.quantize_model(sys.argv[1], sys.argv[2], texts_of, settings)
"""


def test_a_process_that_is_killed_leaves_what_it_has_done(model: Path, tmp_path: Path) -> None:
    """By SIGKILL, which no handler sees."""
    settings = Settings(qformat="int4_awq", group_size=32, kv_cache_dtype="fp8")
    command = [sys.executable, "-c", KILLED, str(model), str(tmp_path / "made")]
    assert subprocess.run(command, timeout=300).returncode == -signal.SIGKILL
    assert not (tmp_path / "made").exists()
    assert len(list((tmp_path / "made.partial").glob("block-*"))) == 2
    for name in ("made", "whole"):
        quantize_model(model, tmp_path / name, texts_of, settings)
    first, second = ((tmp_path / name / "rank0.safetensors").read_bytes() for name in ("made", "whole"))
    assert first == second


KILLED_WRITING = """
import os, signal, sys
from slipstream.quantize import apply
from tests.quantize.test_apply import texts_of

def progress(stage, done, total):
    if stage == "convert":
        os.kill(os.getpid(), signal.SIGKILL)

settings = apply.Settings(qformat="int8_wo")
apply.quantize_model(sys.argv[1], sys.argv[2], texts_of, settings, export_format=sys.argv[3], progress=progress)
"""


@pytest.mark.parametrize("export_format", ["slipstream", "hf"])
def test_a_process_that_is_killed_while_it_writes_the_result(
    export_format: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = [sys.executable, "-c", KILLED_WRITING, str(model), str(tmp_path / "made"), export_format]
    assert subprocess.run(command, timeout=300).returncode == -signal.SIGKILL
    assert not (tmp_path / "made").exists() and list((tmp_path / "made.partial" / "made").iterdir())
    settings = Settings(qformat="int8_wo")
    quantize_model(model, tmp_path / "whole", texts_of, settings, export_format=export_format)
    monkeypatch.setattr(apply.BlockQuantizer, "run", None)  # nothing is quantized again
    (tmp_path / "made").mkdir()  # an empty folder is as good as none
    quantize_model(model, tmp_path / "made", texts_of, settings, export_format=export_format)
    first, second = (sorted((tmp_path / name).rglob("*")) for name in ("made", "whole"))
    assert [path.name for path in first] == [path.name for path in second]
    for one, other in zip(first, second, strict=True):
        assert one.is_dir() or one.read_bytes() == other.read_bytes(), one
    assert not (tmp_path / "made.partial").exists()


def test_an_older_checkpoint_is_written_over(model: Path, tmp_path: Path) -> None:
    for qformat in ("int8_wo", "int4_wo"):
        quantize_model(model, tmp_path / "made", texts_of, Settings(qformat=qformat, group_size=32))
        (tmp_path / "made" / "notes.txt").write_text("the user's own")
    assert open_checkpoint(resolve(tmp_path / "made")).formats["layers.0.mlp.down_proj.weight"].kind == "w4a16"
    assert (tmp_path / "made" / "notes.txt").is_file() and not (tmp_path / "made.partial").exists()


def test_a_folder_of_hugging_face_loads_in_transformers(model: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    settings = Settings(qformat="int8_wo")
    quantize_model(model, tmp_path / "ours", texts_of, settings)
    quantize_model(model, tmp_path / "theirs", texts_of, settings, export_format="hf")
    texts = torch.randint(3, 100, (1, 20), generator=torch.Generator().manual_seed(0))
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "theirs", dtype=torch.float32).eval()(texts).logits
    ours = open_checkpoint(resolve(tmp_path / "ours"), "float32")
    again = open_checkpoint(resolve(tmp_path / "theirs"), "float32")
    name = "layers.1.mlp.down_proj.weight"
    torch.testing.assert_close(ours.read(name), again.read(name))
    with LLM(tmp_path / "ours", dtype="float32") as llm:
        asked = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0)
        found = llm.generate(texts[0].tolist(), asked).prompt_logprobs or ()
    said = [each.logprob for each in found if each is not None]
    expected = theirs[0, :-1].log_softmax(1).gather(1, texts[0, 1:, None])[:, 0]
    torch.testing.assert_close(torch.tensor(said), expected, rtol=1e-4, atol=1e-4)


def test_columns_in_the_order_of_their_activations(model: Path, tmp_path: Path) -> None:
    """Products that share an input share its order, so that an engine joins them; GPTQ's layout has it, too."""
    settings = Settings(qformat="int4_gptq", group_size=32, desc_act=True)
    quantize_model(model, tmp_path / "made", texts_of, settings)
    quantize_model(model, tmp_path / "hf", texts_of, settings, export_format="hf")
    ours, theirs = (open_checkpoint(resolve(tmp_path / name)) for name in ("made", "hf"))
    attention, mlp = ("layers.0.attention.{}_proj.weight", "layers.0.mlp.{}_proj.weight")
    assert len({ours.formats[attention.format(name)] for name in "qkv"}) == 1
    orders = {ours.formats[name].order for name in (attention.format("q"), attention.format("o"), mlp.format("down"))}
    assert len(orders) == 3 and "" not in orders
    for name in ours.formats:
        torch.testing.assert_close(ours.read(name), theirs.read(name), rtol=0, atol=0)
    config = json.loads((tmp_path / "hf" / "config.json").read_text())["quantization_config"]
    assert (config["quant_method"], config["desc_act"]) == ("gptq", True)
    with LLM(tmp_path / "made", dtype="float32") as llm:
        assert llm._folder.graph.count_ops()["linear_w4a16"] == 4 * ours.config.num_layers
        llm.generate([[5, 6, 7]], GREEDY)


def test_what_cannot_be_is_refused(model: Path, tmp_path: Path) -> None:
    cases = [
        (Settings(qformat="int5"), "qformat is 'int5'"),
        (Settings(qformat="int4_awq", group_size=48), "groups of 48"),
        (Settings(qformat="int4_awq", desc_act=True), "--desc_act is GPTQ's order .* int4_gptq"),
        (Settings(qformat="w4a8_awq", bits=5.0), "--auto_quantize_bits goes with int4_awq, .* not with .* w4a8_awq"),
        (Settings(qformat="int8_wo", exclude=("nothing",)), "--exclude_modules 'nothing' fits no weight"),
        (Settings(qformat="int8_wo", kv_skip_layers=(0,)), "left out of a KV cache in 8 bits; give --kv_cache_dtype"),
        (Settings(qformat="int8_wo", kv_cache_dtype="fp8", kv_skip_layers=(3,)), "names layer 3; .* layers 0 to 2"),
        (Settings(qformat="int8_wo", kv_cache_dtype="fp8", kv_skip_layers=(0, 1, 2)), "names all layers; "),
    ]
    for settings, words in cases:
        with pytest.raises(ModelError, match=words):
            quantize_model(model, tmp_path / "made", texts_of, settings)
    with pytest.raises(ModelError, match="needs text to calibrate with"):
        quantize_model(
            model, tmp_path / "made", lambda checkpoint: texts_of(checkpoint, 0), Settings(qformat="int4_awq")
        )
    quantize_model(model, tmp_path / "made", texts_of, Settings(qformat="int8_wo"))
    with pytest.raises(ModelError, match="quantized already"):
        quantize_model(tmp_path / "made", tmp_path / "again", texts_of, Settings(qformat="int8_wo"))
    shutil.copytree(model, tmp_path / "nan")
    checkpoint = open_checkpoint(resolve(model))
    from safetensors.torch import load_file, save_file

    whole = {name: tensor.clone() for name, tensor in load_file(tmp_path / "nan" / "model.safetensors").items()}
    checkpoint.close()
    broken = [  # a weight that is rounded, and others that what is rounded would meet
        ("model.layers.1.mlp.up_proj.weight", "layers.1.mlp.up_proj.weight", "int8_wo"),
        ("model.layers.1.input_layernorm.weight", "layers.1.input_norm.weight", "int4_gptq"),
        ("model.embed_tokens.weight", "embed.weight", "int4_awq"),
    ]
    for theirs, ours, qformat in broken:
        tensors = {name: tensor.clone() for name, tensor in whole.items()}
        tensors[theirs].flatten()[3] = torch.nan if qformat != "int4_awq" else torch.inf
        save_file(tensors, tmp_path / "nan" / "model.safetensors")
        with pytest.raises(ModelError, match=rf"{ours} has numbers that are NaN or infinite"):
            quantize_model(
                tmp_path / "nan", tmp_path / f"never-{qformat}", texts_of, Settings(qformat=qformat, group_size=32)
            )


def test_a_cache_without_calibration_is_judged_with_the_scales_that_engines_take(model: Path, tmp_path: Path) -> None:
    settings = Settings(qformat="full_prec", kv_cache_dtype="fp8")
    texts = texts_of(open_checkpoint(resolve(model)), 0)
    found = quantize_model(model, tmp_path / "made", lambda _: texts, settings, dtype="float32").quality
    made, reference = (open_checkpoint(resolve(path), "float32") for path in (tmp_path / "made", model))
    assert made.kv_cache.dtype == "float8_e4m3fn" and not made.kv_cache.scales
    expected = compare(made, reference, texts.held_out, torch.device("cpu"))
    assert found.kl == pytest.approx(expected.kl) and found.kl > 0


def test_what_a_layout_cannot_hold_is_refused_before_anything_is_rounded(tmp_path: Path) -> None:
    write_random_model(tmp_path / "model", llama.TINY | {"intermediate_size": 72})
    with pytest.raises(UnsupportedModel, match=r"down_proj has 72 columns, which NVFP4's .*; give --exclude_modules"):
        quantize_model(tmp_path / "model", tmp_path / "made", texts_of, Settings(qformat="nvfp4"), export_format="hf")
    assert not (tmp_path / "made.partial" / "block-0000.safetensors").exists()


def test_packed_numbers_are_what_the_report_was_made_of(model: Path, tmp_path: Path) -> None:
    quantize_model(model, tmp_path / "made", texts_of, Settings(qformat="int4_wo", group_size=32))
    checkpoint = open_checkpoint(resolve(tmp_path / "made"), "float32")
    name = "layers.0.attention.o_proj.weight"
    parts = {part: checkpoint.read(f"{name}.{part}") for part in ("packed", "scale")}
    torch.testing.assert_close(checkpoint.read(name), dense_weight(checkpoint.formats[name], parts, 64))
