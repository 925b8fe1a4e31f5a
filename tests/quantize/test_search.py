"""--auto_quantize_bits: no more bits than asked for, and where they matter."""

from pathlib import Path

import pytest
import torch

from slipstream.checkpoint import open_checkpoint, resolve
from slipstream.checkpoint.folder import Checkpoint
from slipstream.checkpoint.random import write_random_model
from slipstream.errors import ModelError
from slipstream.models import llama, qwen3_moe
from slipstream.quantize import apply
from slipstream.quantize.apply import Settings, quantize_model
from slipstream.quantize.names import quantized_names
from slipstream.quantize.search import Unit, _measure, _spend, _units
from slipstream.quantize.stream import Stream, captured_graph
from slipstream.schema.format import WeightFormat
from tests.quantize.test_apply import texts_of

CPU = torch.device("cpu")
INT4 = WeightFormat(kind="w4a16", group_size=32, scale_dtype="float16")
LEVELS = (INT4, WeightFormat(kind="w8a16"))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("search") / "llama"
    write_random_model(folder, llama.TINY)
    return folder


def bits_of(checkpoint: Checkpoint) -> float:
    names = quantized_names(captured_graph(checkpoint).graph, ("lm_head",))
    sizes = {name: checkpoint.shapes[name][0] * checkpoint.shapes[name][1] for name in names}
    total = sum(
        checkpoint.formats[name].num_bytes(*checkpoint.shapes[name]) if name in checkpoint.formats else 2 * size
        for name, size in sizes.items()
    )
    return 8 * total / sum(sizes.values())


@pytest.mark.parametrize("bits", [5.5, 7.0, 16.0])
def test_bits_are_kept_to_and_help(model: Path, bits: float, tmp_path: Path) -> None:
    kl = []
    for name, asked in (("all", None), ("mixed", bits)):
        settings = Settings(qformat="int4_awq", group_size=32, bits=asked)
        kl.append(
            quantize_model(model, tmp_path / name, texts_of, settings, dtype="bfloat16").quality.summary()["kl_nats"]
        )
    checkpoint = open_checkpoint(resolve(tmp_path / "mixed"))
    assert bits - 1.5 < bits_of(checkpoint) <= bits
    assert kl[1] < kl[0]
    assert kl[1] == 0 or bits < 16
    for layer in range(checkpoint.config.num_layers):  # what one product computes has one format
        names = [f"layers.{layer}.attention.{name}_proj.weight" for name in "qkv"]
        assert len({checkpoint.formats.get(name) for name in names}) == 1


@pytest.mark.parametrize("architecture", [llama, qwen3_moe], ids=["llama", "qwen3_moe"])
def test_each_unit_is_measured_alone(architecture: object, tmp_path: Path) -> None:
    """As a whole quantization that leaves out all others says."""
    write_random_model(tmp_path / "model", architecture.TINY)  # type: ignore[attr-defined]
    checkpoint = open_checkpoint(resolve(tmp_path / "model"))
    captured, text = captured_graph(checkpoint), texts_of(checkpoint).held_out
    names = quantized_names(captured.graph, ("lm_head", "router"))
    with torch.inference_mode():
        stream = Stream(checkpoint, captured, [text], CPU)
        units = {b.layer: _units(b, captured.graph, names, LEVELS, checkpoint) for b in stream.blocks}
        _measure(stream, units, LEVELS, lambda *_: None)
    every = [unit for found in units.values() for unit in found]
    assert {name for unit in every for name in unit.weights} == names
    assert sum(len(unit.weights) for unit in every) == len(names)
    for unit in (every[0], every[-1]):
        others = tuple(sorted(names - set(unit.weights)))
        settings = Settings(qformat="int4_wo", group_size=32, exclude=(*others, "lm_head", "router"))
        result = quantize_model(tmp_path / "model", tmp_path / unit.weights[0], texts_of, settings)
        assert unit.kl[0] == pytest.approx(result.quality.summary()["kl_nats"], rel=1e-3)
        assert unit.kl[0] > unit.kl[1] > unit.kl[2] == 0


def test_bytes_go_where_they_help_most() -> None:
    units = [Unit((name,), [4, 8, 16], kl) for name, kl in
             (("calm", [0.01, 0.0, 0.0]), ("wild", [1.0, 0.4, 0.0]), ("noisy", [0.0, 0.1, 0.0]))]  # fmt: skip
    _spend(units, 12)
    assert [unit.level for unit in units] == [0, 2, 0]
    _spend(units, 5)
    assert [unit.level for unit in units] == [1, 2, 0]


def test_a_killed_search_is_not_made_again(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = Settings(qformat="int4_wo", group_size=32, bits=6.0)
    expected = quantize_model(model, tmp_path / "whole", texts_of, settings)

    def stop(stage: str, done: int, total: int) -> None:
        if stage == "quantize" and done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize_model(model, tmp_path / "killed", texts_of, settings, progress=stop)
    monkeypatch.setattr(apply, "choose_formats", None)  # calling it would fail
    found = quantize_model(model, tmp_path / "killed", texts_of, settings)
    assert found.quality == expected.quality
    weights = [(tmp_path / name / "rank0.safetensors").read_bytes() for name in ("whole", "killed")]
    assert weights[0] == weights[1]


def test_what_cannot_be_is_refused(model: Path, tmp_path: Path) -> None:
    for settings, size, sentence in (
        (
            Settings(qformat="int4_wo", bits=3.0),
            4,
            r"is 3.0, but the smallest format takes 4\.\d+ bits a weight",
        ),
        (Settings(qformat="fp8", bits=9.0), 4, "goes with int4_awq, int4_gptq or int4_wo, not with qformat fp8"),
        (Settings(qformat="int4_wo", bits=5.0), 0, "needs text to measure with"),
    ):
        with pytest.raises(ModelError, match=sentence):
            quantize_model(model, tmp_path / "no", lambda checkpoint, size=size: texts_of(checkpoint, size), settings)
        assert not (tmp_path / "no").exists() and not (tmp_path / "no.partial").exists()
