"""The streamed graph computes what transformers computes, block by block."""

from pathlib import Path

import pytest
import torch

from slipstream.checkpoint import open_checkpoint, resolve
from slipstream.checkpoint.random import write_random_model
from slipstream.models import gemma2, gpt2, llama, qwen3_moe
from slipstream.quantize.stream import Stream, captured_graph

CPU = torch.device("cpu")


@pytest.mark.parametrize("model", [llama, gemma2, gpt2, qwen3_moe], ids=lambda model: model.__name__.rpartition(".")[2])
def test_blocks_one_after_another_are_the_model(tmp_path: Path, model: object) -> None:
    from transformers import AutoModelForCausalLM

    write_random_model(tmp_path, model.TINY)  # type: ignore[attr-defined]
    texts = torch.randint(3, 100, (3, 40), generator=torch.Generator().manual_seed(0))
    expected = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()(texts).logits
    checkpoint = open_checkpoint(resolve(tmp_path), "float32")
    with torch.inference_mode():
        stream = Stream(checkpoint, captured_graph(checkpoint), [texts[:2], texts[2:]], CPU)
        assert [block.layer for block in stream.blocks] == list(range(-1, checkpoint.config.num_layers + 1))
        for block in stream.blocks:
            stream.advance(block, stream.weights(block))
    found = torch.cat([state[stream.graph.outputs[0]] for state in stream.states]).view(3, 40, -1)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
