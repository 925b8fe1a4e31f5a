"""slipstream quantize on a GPU says of a format what it says on a CPU, but for what sums in another order turn over.

Only on a GPU.
"""

from pathlib import Path

import pytest
import torch

from slipstream import LLM
from slipstream.checkpoint.random import write_random_model
from slipstream.models import llama, qwen3_moe
from slipstream.quantize.apply import Settings, quantize_model
from slipstream.quantize.qformats import QFORMATS
from tests.quantize.test_apply import GREEDY, texts_of

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

CASES = {name: Settings(qformat=name, group_size=32, kv_cache_dtype="fp8") for name in QFORMATS} | {
    "act-order": Settings(qformat="int4_gptq", group_size=32, desc_act=True),
    "mixed": Settings(qformat="int4_wo", group_size=32, bits=6.0),
}


@pytest.mark.parametrize("model", [llama, qwen3_moe], ids=["llama", "qwen3_moe"])
@pytest.mark.parametrize("case", CASES)
def test_quality_is_that_of_the_cpu(case: str, model: object, tmp_path: Path) -> None:
    write_random_model(tmp_path / "model", model.TINY)  # type: ignore[attr-defined]
    kl = {}
    for device in ("cpu", "cuda"):
        result = quantize_model(
            tmp_path / "model", tmp_path / device, texts_of, CASES[case], dtype="float32", device=torch.device(device)
        )
        kl[device] = result.quality.summary()["kl_nats"]
    assert kl["cuda"] == pytest.approx(kl["cpu"], rel=0.25)
    with LLM(tmp_path / "cuda", device="cuda", max_batch_size=2, max_seq_len=64) as llm:
        (output,) = llm.generate([[5, 6, 7]], GREEDY)
    assert len(output.outputs[0].token_ids) == 4
