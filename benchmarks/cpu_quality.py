"""Perplexity of SmolLM2-135M in the formats of a CPU, by the engine that runs it: the logprobs of texts as prompts.

    python benchmarks/cpu_quality.py [--texts 16] [--length 512] [--formats none,int8,int8+bfloat16]

A format may name a KV cache after a +.

The texts are those that `slipstream eval` takes by default. Beside the perplexity stands the mean difference of a
token's logprob from that of the first format, and how far it is away on average.
"""

import argparse
import math

import torch

from slipstream import LLM, SamplingParams
from slipstream.quantize.texts import built_in, cut


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--texts", type=int, default=16)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--formats", default="none,gguf,int8,int8_wo,int4_wo")
    arguments = parser.parse_args()
    first = None
    print("| format | perplexity | to the first | mean difference of logprobs | mean distance |")
    print("| --- | --- | --- | --- | --- |")
    for name in arguments.formats.split(","):
        weights, _, cache = name.partition("+")
        quantization = None if weights == "none" else weights
        logprobs = measure(arguments.model, quantization, cache or "auto", arguments.texts, arguments.length)
        first = logprobs if first is None else first
        perplexity, change = math.exp(-logprobs.mean()), math.exp((first - logprobs).mean()) - 1
        difference = logprobs - first
        print(
            f"| {name} | {perplexity:.3f} | {change:+.2%} | {difference.mean():+.4f} | {difference.abs().mean():.4f} |",
            flush=True,
        )


def measure(model: str, quantization: str | None, cache: str, num_texts: int, length: int) -> torch.Tensor:
    options = {"dtype": "float32", "quantization": quantization, "kv_cache_dtype": cache}
    with LLM(model, **options, enable_block_reuse=False) as llm:
        pieces = cut(built_in(), llm.tokenizer.encode, num_calibration=0, num_held_out=num_texts, length=length, seed=0)
        texts = pieces.held_out.tolist()
        sampling = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0)
        outputs = [llm.generate(text, sampling) for text in texts]
        found = [each.logprob for output in outputs for each in output.prompt_logprobs or () if each is not None]
    return torch.tensor(found, dtype=torch.float64)


if __name__ == "__main__":
    main()
