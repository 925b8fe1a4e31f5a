"""The quality that is printed: the same for what was written as while it was made, and the engine's own."""

from pathlib import Path

import pytest
import torch

from slipstream import LLM
from slipstream.checkpoint import open_checkpoint, resolve
from slipstream.checkpoint.random import write_random_model
from slipstream.errors import ModelError
from slipstream.models import llama, qwen3_moe
from slipstream.quantize.apply import Settings, quantize_model
from slipstream.quantize.compare import compare
from tests.quantize.test_apply import texts_of

CPU = torch.device("cpu")
CASES = [
    (llama, Settings(qformat="full_prec", kv_cache_dtype="int8")),
    (llama, Settings(qformat="fp8", kv_cache_dtype="fp8")),
    (llama, Settings(qformat="full_prec", kv_cache_dtype="fp8", kv_skip_layers=(0, 2))),
    (llama, Settings(qformat="int8_sq")),
    (llama, Settings(qformat="int4_awq", group_size=32, kv_cache_dtype="int8")),
    (qwen3_moe, Settings(qformat="fp8_block")),
    (qwen3_moe, Settings(qformat="int8_sq", kv_cache_dtype="fp8")),
]


@pytest.mark.parametrize(("model", "settings"), CASES, ids=lambda each: getattr(each, "qformat", None))
def test_what_is_printed_is_what_engines_do(model: object, settings: Settings, tmp_path: Path) -> None:
    write_random_model(tmp_path / "model", model.TINY)  # type: ignore[attr-defined]
    result = quantize_model(tmp_path / "model", tmp_path / "made", texts_of, settings, dtype="float32")
    made, plain = (open_checkpoint(resolve(tmp_path / name), "float32") for name in ("made", "model"))
    held_out = texts_of(plain).held_out
    found, expected = compare(made, plain, held_out, CPU).summary(), result.quality.summary()
    assert found["kl_nats"] > 0
    assert found == {**expected, "worst_layers": found["worst_layers"]} | {
        name: pytest.approx(expected[name], rel=1e-3, abs=1e-6)
        for name in ("perplexity", "reference_perplexity", "kl_nats", "perplexity_change_percent")
    }
    for one, other in zip(found["worst_layers"], expected["worst_layers"], strict=True):
        assert one["layer"] == other["layer"] and one["error"] == pytest.approx(other["error"], rel=1e-3)

    with LLM(tmp_path / "made", dtype="float32") as llm:
        scores = llm.score([text.tolist() for text in held_out])
    logprobs = torch.tensor([score.logprobs[1:] for score in scores], dtype=torch.float64)
    # A key halfway between two numbers of E4M3 may go either way in the engine's order of sums, and move later tokens.
    tolerance = 1e-3 if settings.kv_cache_dtype == "fp8" else 1e-4
    assert (-logprobs).mean().exp().item() == pytest.approx(expected["perplexity"], rel=tolerance)


def test_models_of_other_depths_have_no_layers_to_compare(tmp_path: Path) -> None:
    write_random_model(tmp_path / "model", llama.TINY)
    write_random_model(tmp_path / "shallow", llama.TINY | {"num_hidden_layers": 1})
    write_random_model(tmp_path / "other", llama.TINY | {"vocab_size": 64})
    model, shallow, other = (open_checkpoint(resolve(tmp_path / name)) for name in ("model", "shallow", "other"))
    held_out = texts_of(model).held_out
    quality = compare(shallow, model, held_out, CPU)
    assert quality.layer_errors == {} and quality.kl > 0
    assert compare(model, model, held_out, CPU).summary()["top1_agreement"] == 1
    with pytest.raises(ModelError, match="has 64 tokens and model"):
        compare(other, model, held_out, CPU)
