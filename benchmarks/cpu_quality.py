"""Perplexity of SmolLM2-135M in the formats of a CPU, by the engine that runs it: the logprobs of texts as prompts.

    PYTHONPATH=. python benchmarks/cpu_quality.py [--texts 16] [--length 512] [--formats none,int8,int8+bfloat16]
        [--llama_python PYTHON] [--openvino_python PYTHON]

A format may name a KV cache after a +. The texts are those that `slipstream eval` takes by default. Beside the
perplexity stands the mean difference of a token's logprob from that of the first format, and how far it is away on
average. With other interpreters (benchmarks/cpu_peers.py says what is in them) llama.cpp and OpenVINO GenAI say theirs
of the same tokens.
"""

import argparse
import json
import math
import os
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

from benchmarks.cpu_peers import as_q4_0, gguf

Texts = list[list[int]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--texts", type=int, default=16)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--formats", default="none,gguf,int8,int8_wo,int4_wo")
    parser.add_argument("--llama_python")
    parser.add_argument("--openvino_python")
    parser.add_argument("--turn", nargs=2, help=argparse.SUPPRESS)  # a peer's name, the file of the texts
    arguments = parser.parse_args()
    if arguments.turn:
        name, file = arguments.turn
        print("RESULT", json.dumps(PEERS[name](json.loads(Path(file).read_text()))))
        return
    texts = held_out(arguments.model, arguments.texts, arguments.length)
    print("| format | perplexity | to the first | mean difference of logprobs | mean distance |")
    print("| --- | --- | --- | --- | --- |")
    first = None
    for name in arguments.formats.split(","):
        found = np.array(measure(arguments.model, name, texts))
        first = found if first is None else first
        print_row(name, found, first)
    pythons = {"llama.cpp": arguments.llama_python, "OpenVINO GenAI": arguments.openvino_python}
    for name in PEERS:
        if (python := pythons[name.partition(",")[0]]) is not None and first is not None:
            print_row(name, np.array(ask_peer(name, python, texts)), first)


def print_row(name: str, found: np.ndarray, first: np.ndarray) -> None:
    difference = found - first
    perplexity, change = math.exp(-found.mean()), math.exp(-difference.mean()) - 1
    row = f"{name} | {perplexity:.3f} | {change:+.2%} | {difference.mean():+.4f} | {abs(difference).mean():.4f}"
    print(f"| {row} |", flush=True)


def held_out(model: str, num_texts: int, length: int) -> Texts:
    from slipstream import LLM
    from slipstream.quantize.texts import built_in, cut

    with LLM(model) as llm:
        pieces = cut(built_in(), llm.tokenizer.encode, num_calibration=0, num_held_out=num_texts, length=length, seed=0)
    texts: Texts = pieces.held_out.tolist()
    return texts


def measure(model: str, name: str, texts: Texts) -> list[float]:
    from slipstream import LLM, SamplingParams

    weights, _, cache = name.partition("+")
    options = {"quantization": None if weights == "none" else weights, "kv_cache_dtype": cache or "auto"}
    with LLM(model, dtype="float32", **options, enable_block_reuse=False) as llm:  # type: ignore[arg-type]
        sampling = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0)
        outputs = [llm.generate(text, sampling) for text in texts]
    return [each.logprob for output in outputs for each in output.prompt_logprobs or () if each is not None]


def ask_peer(name: str, python: str, texts: Texts) -> list[float]:
    """A process of its own interpreter, which has none of our packages."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "texts.json"
        file.write_text(json.dumps(texts))
        environment = os.environ | {"SMOLLM2_GGUF": gguf()}
        command = [python, __file__, "--turn", name, str(file)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    result = next((line for line in done.stdout.splitlines() if line.startswith("RESULT ")), None)
    assert result is not None, done.stderr
    logprobs: list[float] = json.loads(result.removeprefix("RESULT "))
    return logprobs


def of_llama(path: str, texts: Texts) -> list[float]:
    import llama_cpp as cpp

    model = cpp.llama_model_load_from_file(path.encode(), cpp.llama_model_default_params())
    how = cpp.llama_context_default_params()
    how.n_ctx = how.n_batch = how.n_ubatch = max(len(text) for text in texts)
    context = cpp.llama_init_from_model(model, how)
    batch = cpp.llama_batch_init(how.n_batch, 0, 1)
    vocab_size = cpp.llama_vocab_n_tokens(cpp.llama_model_get_vocab(model))
    logprobs = []
    for text in texts:
        cpp.llama_memory_clear(cpp.llama_get_memory(context), False)
        batch.n_tokens = len(text)
        for row, token in enumerate(text):
            batch.token[row], batch.pos[row], batch.logits[row] = token, row, True
            batch.n_seq_id[row], batch.seq_id[row][0] = 1, 0
        assert cpp.llama_decode(context, batch) == 0
        for row, token in enumerate(text[1:]):
            logits = np.ctypeslib.as_array(cpp.llama_get_logits_ith(context, row), (vocab_size,)).astype(np.float64)
            logprobs.append(float(logits[token] - logits.max() - np.log(np.exp(logits - logits.max()).sum())))
    return logprobs


def of_openvino(texts: Texts) -> list[float]:
    import openvino
    import openvino_genai

    scheduler = openvino_genai.SchedulerConfig()
    scheduler.max_num_batched_tokens, scheduler.cache_size, scheduler.enable_prefix_caching = 2048, 1, False
    pipeline = openvino_genai.ContinuousBatchingPipeline(os.environ["SMOLLM2_GGUF"], scheduler, "CPU", {})
    how = openvino_genai.GenerationConfig(max_new_tokens=1, ignore_eos=True, do_sample=False, echo=True, logprobs=1)
    logprobs = []
    for number, text in enumerate(texts):
        handle = pipeline.add_request(number, openvino.Tensor(np.array([text], np.int64)), how)
        while pipeline.has_non_finished_requests():
            pipeline.step()
        (output,) = handle.read_all()
        assert output.generated_ids[: len(text)] == text
        logprobs += output.generated_log_probs[1 : len(text)]
    return logprobs


PEERS: dict[str, Callable[[Texts], list[float]]] = {
    "llama.cpp, Q4_1 as shipped": lambda texts: of_llama(os.environ["SMOLLM2_GGUF"], texts),
    "llama.cpp, Q4_0": lambda texts: of_llama(as_q4_0(os.environ["SMOLLM2_GGUF"]), texts),
    "OpenVINO GenAI, the GGUF": of_openvino,
}


if __name__ == "__main__":
    main()
