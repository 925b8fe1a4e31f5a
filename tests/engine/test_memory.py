"""plan_memory against numbers counted by hand."""

import torch

from slipstream.build.capture import capture
from slipstream.build.pipeline import run_pipeline
from slipstream.engine.graph import DTYPES, Graph, TensorType
from slipstream.engine.memory import plan_memory
from slipstream.models import llama, read_config
from slipstream.schema.build import MAX_RECORDED_TOKENS


def test_the_plan_of_the_tiny_llama_is_the_hand_count() -> None:
    _, config = read_config(llama.TINY, "tiny")
    graph = capture(llama.Model, config, "float32", 16).graph
    run_pipeline(graph, promised=llama.PROMISED_PASSES, disabled=())
    plan = plan_memory(graph, max_num_tokens=100, max_batch_size=5)

    attention, mlp, norms = 64 * (64 + 2 * 32) + 64 * 64, 3 * 96 * 64, 2 * 64
    weights = 3 * (attention + mlp + norms) + 64 + 2 * 128 * 64 + 8  # layers, last norm, embedding and head, rotary
    # The widest moment is silu_and_mul: its input and output, the residual, cos and sin (8 columns each).
    activations = 100 * (2 * 96 + 96 + 64 + 8 + 8)
    assert plan == {
        "weights": 4 * weights,
        "activations": 4 * activations,
        "recorded": 4 * activations,
    }
    longer = plan_memory(graph, max_num_tokens=5000, max_batch_size=5)
    assert longer["activations"] == 50 * plan["activations"]
    assert longer["recorded"] * 100 == MAX_RECORDED_TOKENS * plan["activations"]


def test_weights_of_every_dtype_count() -> None:
    weights = {dtype: TensorType((3, 2), dtype) for dtype in DTYPES}
    plan = plan_memory(Graph({}, weights, [], ()), max_num_tokens=1, max_batch_size=1)
    assert plan["weights"] == 6 * sum(getattr(torch, dtype).itemsize for dtype in DTYPES)


def test_half_the_bytes_in_bfloat16() -> None:
    _, config = read_config(llama.TINY, "tiny")
    plans = []
    for dtype in ("float32", "bfloat16"):
        graph = capture(llama.Model, config, dtype, 16).graph
        run_pipeline(graph, promised=llama.PROMISED_PASSES, disabled=())
        plans.append(plan_memory(graph, max_num_tokens=100, max_batch_size=5))
    full, half = plans
    assert full["weights"] - 2 * half["weights"] == -4 * 8  # the rotary table stays float32
