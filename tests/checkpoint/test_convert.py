"""A model folder becomes a checkpoint: exactly the model's tensors, under our names, or an error that names one."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from slipstream.checkpoint import convert, open_checkpoint, resolve
from slipstream.checkpoint.folder import new_folder
from slipstream.checkpoint.random import write_random_model
from slipstream.errors import CorruptFile, ModelError, UnsupportedModel
from slipstream.models import llama


def change_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> Path:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    return folder


def tiny(tmp_path: Path, **options: Any) -> Path:
    return write_random_model(tmp_path / "model", llama.TINY | options)


def change_config(folder: Path, **options: Any) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | options))
    return folder


# ----- what may be in a folder


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    folder = change_weights(tiny(tmp_path), lambda t: t.pop("model.layers.1.mlp.up_proj.weight"))
    with pytest.raises(CorruptFile, match=r"lacks the tensor for layers\.1\.mlp\.up_proj\.weight \[96, 64\]"):
        open_checkpoint(resolve(folder))


def test_a_tensor_left_over_is_named(tmp_path: Path) -> None:
    folder = change_weights(tiny(tmp_path), lambda t: t.update({"model.extra": torch.ones(1), "x": torch.ones(1)}))
    with pytest.raises(CorruptFile, match=r"holds the tensor (model\.extra|x) and 1 more"):
        open_checkpoint(resolve(folder))


def test_a_tensor_of_the_wrong_shape_is_named(tmp_path: Path) -> None:
    folder = change_weights(tiny(tmp_path), lambda t: t.update({"model.norm.weight": torch.ones(63)}))
    with pytest.raises(CorruptFile, match=r"model\.norm\.weight is \[63\]; .* config asks for \[64\]"):
        open_checkpoint(resolve(folder))


def test_a_bias_that_the_config_does_not_announce_is_refused(tmp_path: Path) -> None:
    name = "model.layers.0.self_attn.q_proj.bias"
    folder = change_weights(tiny(tmp_path), lambda t: t.update({name: torch.ones(64)}))
    with pytest.raises(CorruptFile, match=r"q_proj\.bias, which its config has no place for"):
        open_checkpoint(resolve(folder))


@pytest.mark.parametrize("num_layers", [2, 4])
def test_a_layer_count_that_is_not_the_weights_is_refused(tmp_path: Path, num_layers: int) -> None:
    folder = change_config(tiny(tmp_path), num_hidden_layers=num_layers)
    with pytest.raises(CorruptFile, match=r"(holds|lacks) the tensor .*layers\.[23]\."):
        open_checkpoint(resolve(folder))


@pytest.mark.parametrize("number", ["01", "3", "99999", "100000"])
def test_a_layer_beyond_the_count_is_refused(tmp_path: Path, number: str) -> None:
    name = f"model.layers.{number}.input_layernorm.weight"
    folder = change_weights(tiny(tmp_path), lambda t: t.update({name: torch.ones(64)}))
    with pytest.raises(CorruptFile, match="holds the tensor"):
        open_checkpoint(resolve(folder))


def test_tied_embeddings_ignore_a_second_copy_of_the_head(tmp_path: Path) -> None:
    folder = tiny(tmp_path, tie_word_embeddings=True)
    embedding = load_file(folder / "model.safetensors")["model.embed_tokens.weight"]
    change_weights(folder, lambda t: t.update({"lm_head.weight": embedding.clone()}))
    assert "lm_head.weight" not in open_checkpoint(resolve(folder)).recipes


def test_a_rotary_table_of_an_old_export_is_ignored(tmp_path: Path) -> None:
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    folder = change_weights(tiny(tmp_path), lambda t: t.update({name: torch.ones(8)}))
    recipes = open_checkpoint(resolve(folder)).recipes.values()
    assert all(name not in recipe.sources for recipe in recipes)


# ----- what may be in a config.json


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"sliding_window": 4096}, UnsupportedModel, r"llama does not know the option 'sliding_window' \(4096\)"),
        ({"model_type": "mamba"}, UnsupportedModel, "'mamba' is not known; known are .*llama"),
        ({"model_type": None}, CorruptFile, "model_type is None; it must be one of .*llama"),
        ({"hidden_act": "gelu"}, UnsupportedModel, "hidden_act is 'gelu'; the known values are silu"),
        ({"rope_scaling": {"rope_type": "mrope", "factor": 2}}, UnsupportedModel, "rope_type is 'mrope'"),
        ({"rope_scaling": {"type": "linear", "factor": 0}}, CorruptFile, "factor of RoPE is 0.0; it must be above 0"),
        ({"rope_theta": 0}, CorruptFile, "theta of RoPE is 0.0; it must be above 0"),
        ({"rope_freq_factors": [1.0] * 7}, CorruptFile, "has 7 short factors; rotating 16 numbers a head takes 8"),
        ({"num_hidden_layers": 1025}, CorruptFile, "num_hidden_layers is 1025; .* from 1 to 1024"),
        ({"num_hidden_layers": 10**400}, CorruptFile, "num_hidden_layers is 1000"),
        ({"num_key_value_heads": 3}, CorruptFile, "num_key_value_heads is 3; it must divide 4"),
        ({"head_dim": 2**31}, CorruptFile, "head_dim is 2147483648; .* from 1 to 8192"),
        ({"num_attention_heads": 128}, CorruptFile, "head_dim is 0"),
        ({"hidden_size": 2**31, "vocab_size": 2**31, "head_dim": 16}, CorruptFile, "larger than any memory"),
        ({"vocab_size": True}, CorruptFile, "vocab_size is True"),
        ({"hidden_size": "64"}, CorruptFile, "hidden_size is '64'"),
        ({"rms_norm_eps": float("nan")}, CorruptFile, "rms_norm_eps is nan"),
        ({"tie_word_embeddings": "yes"}, CorruptFile, "tie_word_embeddings is 'yes'"),
    ],
)
def test_an_option_that_cannot_be_is_named(
    tmp_path: Path, options: dict[str, Any], kind: type[ModelError], message: str
) -> None:
    folder = change_config(tiny(tmp_path), **options)
    with pytest.raises(kind, match=message):
        open_checkpoint(resolve(folder))


def test_an_unknown_option_that_says_no_is_no_error(tmp_path: Path) -> None:
    open_checkpoint(resolve(change_config(tiny(tmp_path), use_sliding_window=False, quantization_config=None)))


def test_an_unknown_dtype_lists_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="dtype is 'int3'; it must be auto, float32, bfloat16, float16"):
        open_checkpoint(resolve(tiny(tmp_path)), "int3")


# ----- save and open


@pytest.mark.parametrize("dtype", ["auto", "float32", "bfloat16", "float16"])
def test_a_saved_checkpoint_opens_as_it_was(tmp_path: Path, dtype: str) -> None:
    folder = write_random_model(
        tmp_path / "model", llama.TINY | {"attention_bias": True, "mlp_bias": True}, dtype="float32"
    )
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 3], "temperature": 0.6}))
    before = open_checkpoint(resolve(folder), dtype)
    convert(folder, tmp_path / "out", dtype=dtype)
    after = open_checkpoint(resolve(tmp_path / "out"))
    assert (after.config, after.dtype, after.generation) == (before.config, before.dtype, before.generation)
    assert after.generation["eos_token_id"] == [2, 3]
    assert set(after.recipes) == set(before.recipes)
    for name in before.recipes:
        assert after.read(name).dtype == getattr(torch, before.dtype)
        assert torch.equal(after.read(name), before.read(name))


def test_auto_keeps_the_published_dtype_and_a_saved_one_may_be_changed_again(tmp_path: Path) -> None:
    convert(write_random_model(tmp_path / "model", llama.TINY, dtype="bfloat16"), tmp_path / "out")
    assert open_checkpoint(resolve(tmp_path / "out")).dtype == "bfloat16"
    wider = open_checkpoint(resolve(tmp_path / "out"), "float32")
    assert wider.read("norm.weight").dtype == torch.float32


def test_the_same_model_twice_gives_the_same_bytes_and_another_seed_others(tmp_path: Path) -> None:
    files = [write_random_model(tmp_path / str(i), llama.TINY, seed=i // 2) / "model.safetensors" for i in range(4)]
    first, again, other, _ = (file.read_bytes() for file in files)
    assert first == again != other


def test_converting_twice_into_the_same_folder_is_allowed(tmp_path: Path) -> None:
    for _ in range(2):
        convert(tiny(tmp_path), tmp_path / "out")
    with pytest.raises(ModelError, match="give another --output_dir"):
        convert(tmp_path / "out", tmp_path / "out", dtype="bfloat16")  # not into itself


@pytest.mark.parametrize("config", [None, "{}", "[]", "{", '{"format": "slipstream-engine"}', "[" * 100_000])
def test_a_folder_with_someones_files_is_refused_and_left_alone(tmp_path: Path, config: str | None) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("years of work")
    if config is not None:
        (out / "config.json").write_text(config)
    before = sorted((file.name, file.read_text()) for file in out.iterdir())
    with pytest.raises(ModelError, match="out is not empty and holds no slipstream-checkpoint"):
        convert(tiny(tmp_path), out)
    assert sorted((file.name, file.read_text()) for file in out.iterdir()) == before


def test_an_output_that_is_a_file_or_lies_in_one_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("text")
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ModelError, match=r"cannot be written .*give another --output_dir"):
            convert(tiny(tmp_path), out)


def test_an_interrupted_save_leaves_no_config(tmp_path: Path) -> None:
    def interrupted() -> None:
        with new_folder(tmp_path / "out", "slipstream-checkpoint"):
            raise KeyboardInterrupt

    convert(tiny(tmp_path), tmp_path / "out")
    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert not (tmp_path / "out" / "config.json").exists()


def test_what_is_no_longer_a_checkpoint_is_refused(tmp_path: Path) -> None:
    convert(tiny(tmp_path), tmp_path / "out")
    good = json.loads((tmp_path / "out" / "config.json").read_text())
    for change, message in (
        ({"version": 2}, "is version 2 of slipstream-checkpoint.* convert"),
        ({"dtype": "int3"}, "dtype is 'int3'"),
        ({"dtype": []}, r"dtype is \[\]"),
        ({"model": []}, "model and generation must be objects"),
        ({"generation": None}, "model and generation must be objects"),
    ):
        (tmp_path / "out" / "config.json").write_text(json.dumps(good | change))
        with pytest.raises(ModelError, match=message):
            open_checkpoint(resolve(tmp_path / "out"))
