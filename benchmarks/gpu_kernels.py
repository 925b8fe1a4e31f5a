"""Every op of a large model on one GPU beside its floor: slipstream bench kernels, without an engine to build first.

    python benchmarks/gpu_kernels.py --shape llama-3-8b --format bf16 [--rows 1,8,64,2048] [--ops 'linear*,attention']

Nothing is written: the graph of the shape is planned, its kernels are measured as a build does, and each op is timed.
"""

import argparse

import torch
from gpu_step import FORMATS, SHAPES, checkpoint_of

from slipstream.bench.kernels import bench_kernels
from slipstream.build import plan_build
from slipstream.build.tune import tune
from slipstream.cli.bench.kernels import print_report
from slipstream.schema.build import BuildConfig


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--shape", choices=SHAPES, default="llama-3-8b")
    parser.add_argument("--format", choices=FORMATS, default="bf16")
    parser.add_argument("--rows", default="1,8,64,2048")
    parser.add_argument("--context", default="256,2048")
    parser.add_argument("--ops", default="*")
    parser.add_argument("--device", default="cuda")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    config = BuildConfig(max_batch_size=256, max_num_tokens=2048, tokens_per_block=32)
    plan = plan_build(checkpoint_of(arguments.shape, arguments.format), config)
    choices = tune(plan.graph, device, max_num_tokens=config.max_num_tokens, max_batch_size=config.max_batch_size)
    rows, contexts = ([int(number) for number in text.split(",")] for text in (arguments.rows, arguments.context))
    report = bench_kernels(
        plan.graph, plan.manifest, choices, device, rows=rows, contexts=contexts, patterns=arguments.ops.split(",")
    )
    print_report(report, plan.manifest)


if __name__ == "__main__":
    main()
