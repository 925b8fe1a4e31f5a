"""Every model in every family of formats; and the README's table, which is written from this list.

python -m tests.checkpoint.test_model_formats --write puts it there; without --write it prints the table.
"""

from pathlib import Path

import pytest
import torch

from slipstream.checkpoint import open_checkpoint, resolve
from slipstream.engine.folder import open_engine
from slipstream.models import known_models, model_file
from tests.checkpoint import llama_cpp, tensorrt_llm
from tests.checkpoint.naive_formats import FORMATS
from tests.checkpoint.test_formats import (
    ACTIVATION_TOLERANCE,
    TOKEN_IDS,
    TOLERANCE,
    build_engine,
    logits_of,
    write_quantized,
)
from tests.oracle import GraphRunner

README = Path(__file__).parents[2] / "README.md"
START, END = "<!-- models and formats: written by tests/checkpoint/test_model_formats.py -->", "<!-- end -->"

# One of each family stands for it here; test_formats.py walks them all on one model.
EXAMPLES = {
    "AWQ": "awq",
    "GPTQ": "gptq-4-act-order",
    "compressed-tensors": "ct-int-w8a8",
    "FP8": "fp8-blocks",
    "ModelOpt": "modelopt-fp8",
}
EXPERTS = {"deepseek_v3", "mixtral", "qwen3_moe"}  # gpt-oss packs its own as MXFP4 alone (test_mxfp4.py)
NO_LINEARS = {"gpt2"}  # its products are Conv1D, which none of the tools quantizes
OTHER_COLUMNS = {
    "GGUF": set(llama_cpp.ARCHITECTURES),  # tests/checkpoint/test_gguf_models.py
    "TensorRT-LLM": set(tensorrt_llm.ARCHITECTURES),  # tests/checkpoint/test_trtllm.py
}
CASES = [(model, column) for model in known_models() if model not in NO_LINEARS for column in EXAMPLES]


@pytest.mark.parametrize(("model_type", "column"), CASES, ids=["-".join(case) for case in CASES])
def test_a_model_runs_in_a_format(model_type: str, column: str, tmp_path: Path) -> None:
    format = FORMATS[EXAMPLES[column]]
    model, reference = write_quantized(tmp_path / "model", model_file(model_type).TINY, format)
    checkpoint = open_checkpoint(resolve(model))
    assert {each.kind for each in checkpoint.formats.values()} == {format.kind}
    expected = logits_of(reference)
    assert expected.std() > 0.1
    engine = build_engine(model, tmp_path / "engine")
    ops = open_engine(engine).graph.count_ops()
    if model_type in EXPERTS:  # each has an order of columns of its own where there is one
        assert ("experts" if "act-order" in EXAMPLES[column] else f"experts_{format.kind}") in ops
    tolerance = TOLERANCE if format.activations is None else ACTIVATION_TOLERANCE
    torch.testing.assert_close(GraphRunner(engine).logits(TOKEN_IDS), expected, atol=tolerance, rtol=0)


def table() -> str:
    columns = ["Hugging Face", *EXAMPLES, *OTHER_COLUMNS]
    lines = [f"| model_type | {' | '.join(columns)} |", f"| --- |{' --- |' * len(columns)}"]
    for model in known_models():
        found = {"Hugging Face"} | {column for each, column in CASES if each == model}
        found |= {column for column, models in OTHER_COLUMNS.items() if model in models}
        lines.append(f"| {model} | {' | '.join('✓' if column in found else '' for column in columns)} |")
    return "\n".join(lines)


def test_the_readme_claims_what_is_tested() -> None:
    _, _, rest = README.read_text(encoding="utf-8").partition(START)
    written, _, _ = rest.partition(END)
    assert written.strip() == table(), "write it anew: this module, with --write"


def write() -> None:
    text = README.read_text(encoding="utf-8")
    before, _, rest = text.partition(START)
    _, _, after = rest.partition(END)
    README.write_text(f"{before}{START}\n\n{table()}\n\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    import sys

    write() if "--write" in sys.argv else print(table())
