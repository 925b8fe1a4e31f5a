"""From a model file to an engine: what the passes find in a llama, and what a build refuses."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from slipstream.build import build, plan_build, resolve_limits, write_engine
from slipstream.build.capture import capture
from slipstream.build.example import trace
from slipstream.build.pipeline import FUSIONS, run_pipeline
from slipstream.build.rewrite import ops
from slipstream.build.verify import CAPTURED, FINAL, REWRITTEN, verify
from slipstream.checkpoint import open_checkpoint, resolve
from slipstream.checkpoint.random import write_random_model
from slipstream.engine.folder import open_engine
from slipstream.engine.graph import Graph, graph_from_json
from slipstream.errors import BuildError
from slipstream.models import llama, read_config
from slipstream.schema.build import BuildConfig
from slipstream.schema.format import QUANTIZES_ACTIVATIONS, WeightFormat
from tests.build.support import assert_same, copied

SMALL = BuildConfig(max_batch_size=4, max_num_tokens=32, max_seq_len=64)
NUM_LAYERS = llama.TINY["num_hidden_layers"]
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "tied": {"tie_word_embeddings": True},
    "attention bias": {"attention_bias": True},
    "mlp bias": {"mlp_bias": True},
    "both biases, tied, MQA": {
        "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True, "num_key_value_heads": 1,
    },
    "MHA of one layer": {"num_key_value_heads": 4, "num_hidden_layers": 1},
}  # fmt: skip
every_variant = pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)


def captured(options: dict[str, Any] = {}, model: Any = llama.Model) -> Graph:  # noqa: B006 - only read
    _, config = read_config(llama.TINY | options, "tiny")
    return capture(model, config, "float32", 16).graph


def built(folder: Path, options: dict[str, Any] = {}) -> Path:  # noqa: B006 - only read
    model = write_random_model(folder / "model", llama.TINY | options)
    build(open_checkpoint(resolve(model)), folder / "engine", SMALL)
    return folder / "engine"


@every_variant
def test_every_promised_pass_finds_each_of_its_places(options: dict[str, Any]) -> None:
    graph = captured(options)
    reports = run_pipeline(graph, promised=llama.PROMISED_PASSES, disabled=())
    layers = options.get("num_hidden_layers", NUM_LAYERS)
    found = {report.name: report.matches for report in reports}
    biases = int(options.get("attention_bias", False)) + int(options.get("mlp_bias", False))
    assert {name: found[name] for name in (*llama.PROMISED_PASSES, "fold_constants", "dead_code")} == {
        "fuse_qkv": layers,
        "fuse_gate_up": layers,
        "fuse_rope_kv_write": layers,
        "fuse_add_norm": 2 * layers,
        "last_token": 1,
        "fold_constants": (2 + biases) * layers,
        "dead_code": 0,
    }
    assert len(graph.nodes) == 5 + 10 * layers


@every_variant
def test_the_rewritten_model_computes_what_the_captured_one_did(options: dict[str, Any]) -> None:
    before = captured(options)
    after = copied(before)
    run_pipeline(after, promised=llama.PROMISED_PASSES, disabled=())
    assert_same(before, after, select=True)


@every_variant
def test_every_variant_becomes_an_engine(options: dict[str, Any], tmp_path: Path) -> None:
    engine = open_engine(built(tmp_path, options))
    assert engine.manifest.logits == "selected"
    assert set(engine.weights.names()) == set(engine.graph.weights)
    assert ("lm_head.weight" in engine.graph.weights) != bool(options.get("tie_word_embeddings"))
    engine.close()


def test_values_are_named_after_the_ops_that_make_them() -> None:
    graph = captured()
    run_pipeline(graph, promised=llama.PROMISED_PASSES, disabled=())
    for node in graph.nodes:
        for name in node.outputs:
            assert name.partition(".")[0].rstrip("0123456789").removesuffix("_") == node.op


@pytest.mark.parametrize("name", [each.name for each in FUSIONS])
def test_a_disabled_pass_does_not_run(name: str) -> None:
    before = captured()
    after = copied(before)
    promised = tuple(each for each in llama.PROMISED_PASSES if each != name)
    reports = run_pipeline(after, promised=promised, disabled=(name,))
    assert name not in [report.name for report in reports]
    assert_same(before, after, select=name != "last_token")


def test_disabling_a_promised_pass_is_allowed() -> None:
    run_pipeline(captured(), promised=llama.PROMISED_PASSES, disabled=llama.PROMISED_PASSES)


def test_without_last_token_an_engine_gives_all_logits(tmp_path: Path) -> None:
    model = write_random_model(tmp_path / "model", llama.TINY)
    config = BuildConfig(max_batch_size=4, max_num_tokens=32, disabled_passes=("last_token",))
    build(open_checkpoint(resolve(model)), tmp_path / "engine", config)
    assert open_engine(tmp_path / "engine").manifest.logits == "all"


def test_a_promised_pass_that_finds_nothing_is_an_error_that_names_it_and_the_flag() -> None:
    graph = trace(lambda x, rows, w: ops.linear(x, w), {"x": ("T", 8), "step.logit_rows": ("R",)}, {"w": (4, 8)})
    with pytest.raises(BuildError, match=r"fuse_qkv found nothing .*--disable_pass fuse_qkv"):
        run_pipeline(graph, promised=("last_token", "fuse_qkv"), disabled=())


def test_an_unknown_pass_to_disable_lists_the_known_ones() -> None:
    with pytest.raises(BuildError, match=r"'fuse_everything'; the passes are .*fuse_qkv, .*last_token"):
        run_pipeline(captured(), promised=(), disabled=("fuse_everything",))


def test_a_failed_build_leaves_no_engine(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(resolve(write_random_model(tmp_path / "model", llama.TINY)))
    with pytest.raises(BuildError):
        build(checkpoint, tmp_path / "engine", BuildConfig(max_seq_len=10**6))
    assert not (tmp_path / "engine" / "config.json").exists()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (BuildConfig(max_batch_size=0), "max_batch_size is 0; it must be from 1"),
        (BuildConfig(max_batch_size=2**20, max_num_tokens=2**20), "max_batch_size is 1048576"),
        (BuildConfig(tokens_per_block=-1), "tokens_per_block is -1"),
        (BuildConfig(max_seq_len=0), "max_seq_len is 0"),
        (BuildConfig(max_seq_len=257), "max_seq_len is 257; model takes 1 to 256"),
        (BuildConfig(max_batch_size=64, max_num_tokens=63), "raise it to 64"),
    ],
)
def test_limits_out_of_range_are_named(config: BuildConfig, message: str, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(resolve(write_random_model(tmp_path / "model", llama.TINY)))
    with pytest.raises(BuildError, match=message):
        resolve_limits(config, checkpoint)


def test_a_head_stored_beside_an_equal_embedding_is_one_weight(tmp_path: Path) -> None:
    """As some tools publish a tied model."""
    model = write_random_model(tmp_path / "model", llama.TINY)
    tensors = load_file(model / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, model / "model.safetensors")
    checkpoint = open_checkpoint(resolve(model))
    shared, apart = (
        plan_build(checkpoint, replace(SMALL, disabled_passes=disabled)) for disabled in ((), ("share_weights",))
    )
    assert {"embed.weight", "lm_head.weight"} & set(shared.graph.weights) == {"embed.weight"}
    assert apart.manifest.memory["weights"] - shared.manifest.memory["weights"] == 4 * 128 * 64
    write_engine(shared, tmp_path / "engine", measure_kernels=False)
    open_engine(tmp_path / "engine").close()


def test_weights_that_only_start_alike_stay_apart(tmp_path: Path) -> None:
    model = write_random_model(tmp_path / "model", llama.TINY)
    tensors = load_file(model / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    tensors["lm_head.weight"][-1, -1] += 1
    save_file(tensors, model / "model.safetensors")
    assert open_checkpoint(resolve(model)).equal_weights() == {}


# ----- quantized


@pytest.mark.parametrize("kind", QUANTIZES_ACTIVATIONS)
def test_activations_are_quantized_once_where_they_are_made(kind: str) -> None:
    """By the norms and the activation, for all products that read them; only attention's result needs an op for it."""

    def ops_of(disabled: tuple[str, ...]) -> dict[str, int]:
        graph = captured()
        graph.formats = {name: WeightFormat(kind=kind) for name in graph.weights if name.endswith("_proj.weight")}
        run_pipeline(graph, promised=llama.PROMISED_PASSES, disabled=disabled)
        return {op: count for op, count in graph.count_ops().items() if "quantize" in op or kind in op}

    assert ops_of(()) == {
        f"linear_{kind}": 4 * NUM_LAYERS,
        f"quantize_{QUANTIZES_ACTIVATIONS[kind]}": NUM_LAYERS,
        "rms_norm_quantize": 1,
        "add_rms_norm_quantize": 2 * NUM_LAYERS - 1,
        "silu_and_mul_quantize": NUM_LAYERS,
    }
    all_names = tuple(each.name for each in FUSIONS)
    assert ops_of((*all_names, "fuse_norm_quant", "fuse_act_quant")) == {
        f"linear_{kind}": 7 * NUM_LAYERS,
        f"quantize_{QUANTIZES_ACTIVATIONS[kind]}": 4 * NUM_LAYERS,
    }
    assert ops_of(all_names)["rms_norm_quantize"] == 2 * NUM_LAYERS  # of q, k and v, and of gate and up


def test_products_quantized_in_different_ways_leave_the_norm_as_it_is() -> None:
    graph = captured()
    first = next(name for name in graph.weights if name.endswith("gate_proj.weight"))
    graph.formats = dict.fromkeys([first, first.replace("gate", "up")], WeightFormat(kind="w8a8"))
    graph.formats[first] = WeightFormat(kind="w8a8", input_scale=0.5)
    run_pipeline(graph, promised=llama.PROMISED_PASSES, disabled=())
    assert graph.count_ops()["quantize_w8a8"] == 2
    assert "add_rms_norm_quantize" not in graph.count_ops()


# ----- verify


def test_verify_refuses_what_a_stage_may_not_hold() -> None:
    fused = trace(lambda x, w: ops.silu_and_mul(ops.linear(x, w)), {"x": ("T", 8)}, {"w": (8, 8)})
    with pytest.raises(BuildError, match="captured graph: silu_and_mul may not appear"):
        verify(fused, CAPTURED)
    verify(fused, REWRITTEN)
    joined = trace(lambda x, a: ops.linear(x, ops.concat(a, a)), {"x": ("T", 8)}, {"a": (8, 8)})
    verify(joined, REWRITTEN)
    quantized = trace(lambda x: ops.quantize_fp8(x, input_scale=0.0, input_group_size=0), {"x": ("T", 8)}, {})
    with pytest.raises(BuildError, match="rewritten graph: quantize_fp8 may not appear"):
        verify(quantized, REWRITTEN)
    verify(quantized, FINAL)
    with pytest.raises(BuildError, match="final graph: concat may not appear"):
        verify(joined, FINAL)


def test_verify_refuses_unknown_ops_wrong_attributes_and_changed_outputs() -> None:
    def graph() -> Graph:
        return trace(lambda x, w: ops.rms_norm(x, w, eps=1e-5, weight_offset=0.0), {"x": ("T", 8)}, {"w": (8,)})

    for change, message in (
        ({"op": "magic"}, "final graph calls 'magic', which is no op of this version"),
        ({"attributes": {}}, "final graph calls rms_norm in a way it cannot be called"),
    ):
        broken = graph()
        vars_of = {"op": "rms_norm", "inputs": broken.nodes[0].inputs, "outputs": broken.nodes[0].outputs}
        broken.nodes[0] = type(broken.nodes[0])(**(vars_of | {"attributes": broken.nodes[0].attributes} | change))
        with pytest.raises(BuildError, match=message):
            verify(broken, FINAL)
    other = graph()
    other.types[other.outputs[0]] = type(other.types["x"])(("T", 9), "float32")
    with pytest.raises(BuildError, match=r"the output .* became float32\[T, 8\], it was float32\[T, 9\]"):
        verify(other, FINAL)


def test_shapes_that_do_not_fit_are_a_build_error_that_names_the_node() -> None:
    with pytest.raises(BuildError, match=r"add\(x, y\).* does not take \(float32\[T, 8\], float32\[T, 9\]\)"):
        trace(lambda x, y: ops.add(x, y), {"x": ("T", 8), "y": ("T", 9)}, {})


# ----- capture


def model_calling(function: Any) -> Any:
    class Model(llama.Model):
        def forward(self, step: Any, kv: list[Tensor]) -> Tensor:
            return function(super().forward(step, kv))

    return Model


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda x: x.cosh(), r"the model calls aten\.cosh\.default, which no op stands for; .*aten\.add\.Tensor"),
        (lambda x: nn.functional.gelu(x), r"aten\.gelu\.default"),
        (lambda x: x + 1, "a number to add where a tensor belongs"),
        (lambda x: torch.add(x, x, alpha=2), r"aten\.add\.Tensor with 'alpha', which the op add does not take"),
    ],
)
def test_capture_refuses_what_no_op_stands_for(function: Any, message: str) -> None:
    with pytest.raises(BuildError, match=message):
        captured(model=model_calling(function))


def test_capture_takes_plain_sums_and_products() -> None:
    graph = captured(model=model_calling(lambda x: x * x + x))
    assert [node.op for node in graph.nodes[-2:]] == ["mul", "add"]


# ----- the graph as text


def test_a_graph_survives_its_json() -> None:
    for graph in (captured(), captured(VARIANTS["both biases, tied, MQA"])):
        run_pipeline(graph, promised=llama.PROMISED_PASSES, disabled=())
        again = graph_from_json(graph.to_json())
        graph.prologue = []  # runs at build time only
        graph.weights = dict(sorted(graph.weights.items()))
        assert again == graph
        assert again.digest() == graph.digest()
        assert again.text() == graph.text()
