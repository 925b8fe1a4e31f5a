"""slipstream simulate: what engines would make of a load, without computing anything."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from slipstream.cli import _options as options
from slipstream.cli._tables import print_table
from slipstream.cli.bench import _offline
from slipstream.errors import UsageError
from slipstream.progress import progress_bar

if TYPE_CHECKING:
    from slipstream.bench.simulate import Outcome, Prompt
    from slipstream.bench.timeline import Spread, Timeline
    from slipstream.schema.build import RuntimeConfig


def simulate(
    costs: Annotated[Path, typer.Option(help="What slipstream bench steps measured, here or on another machine.")],
    dataset: _offline.Dataset = None,
    num_requests: _offline.NumRequests = None,
    tokenizer: Annotated[
        str | None, typer.Option(help="For requests that are texts: folder of a tokenizer or a model, or smollm2.")
    ] = None,
    rate: Annotated[float | None, typer.Option(min=1e-6, help="Requests a second, which come at random.")] = None,
    concurrency: Annotated[
        int | None, typer.Option(min=1, help="Requests at a time instead.  [default: all at once]")
    ] = None,
    replicas: Annotated[int, typer.Option(min=1, help="Engines; requests go among them as in serve.")] = 1,
    max_batch_size: options.MaxBatchSize = None,
    max_num_tokens: options.MaxNumTokens = None,
    kv_cache_max_tokens: options.KvCacheMaxTokens = None,
    kv_cache_enable_block_reuse: options.BlockReuse = True,
    enable_chunked_context: options.ChunkedContext = True,
    capacity_scheduler_policy: options.CapacityPolicy = "guaranteed_no_evict",
    random_seed: Annotated[int, typer.Option(help="Of the times at which requests come.")] = 0,
    json_file: _offline.Json = None,
) -> None:
    """Run the scheduler and the KV cache of one engine or a thousand against a load, with steps that take their time.

    Example:
        slipstream bench steps --model smollm2 --output costs.json
        slipstream simulate --costs costs.json --dataset synthetic.txt --rate 20 --replicas 8
    """
    from slipstream.bench.costs_file import CostsFile
    from slipstream.bench.load import Load
    from slipstream.bench.simulate import Simulation
    from slipstream.schema.build import CapacityPolicy

    if dataset is None:
        raise UsageError("There is no --dataset; make one with slipstream bench prepare-dataset.")
    if rate is not None and concurrency is not None:
        raise UsageError("--rate and --concurrency are two kinds of load; give one of them.")
    if capacity_scheduler_policy not in [*CapacityPolicy]:
        known = ", ".join(CapacityPolicy)
        raise UsageError(f"--capacity_scheduler_policy is {capacity_scheduler_policy!r}; it must be one of {known}.")
    engine = CostsFile.read(costs)
    config = replace(
        engine.runtime,
        enable_block_reuse=kv_cache_enable_block_reuse,
        enable_chunked_prefill=enable_chunked_context,
        capacity_policy=CapacityPolicy(capacity_scheduler_policy),
        max_batch_size=max_batch_size or engine.runtime.max_batch_size,
        max_num_tokens=max_num_tokens or engine.runtime.max_num_tokens,
        num_blocks=_blocks(kv_cache_max_tokens, engine.runtime),
    )
    simulation = Simulation(
        config, engine.costs, _prompts(dataset, num_requests, tokenizer), Load(concurrency, rate),
        num_replicas=replicas, runs_ahead=engine.runs_ahead, seed=random_seed,
    )  # fmt: skip
    with progress_bar() as progress:
        outcome = simulation.run(progress)
    print_table(f"{engine.model} × {replicas}, {outcome.run.load}; steps as on {engine.device}", (),
                _rows(outcome, replicas))  # fmt: skip
    if json_file is not None:
        _offline.write_json(
            json_file,
            {"model": engine.model, "device": engine.device, "replicas": replicas, "simulated": True}
            | outcome.run.to_dict()
            | {"steps": len(outcome.steps), "preemptions": outcome.num_preemptions},
        )


def _blocks(max_tokens: int | None, runtime: "RuntimeConfig") -> int:
    return runtime.num_blocks if max_tokens is None else -(-max_tokens // runtime.tokens_per_block)


def _prompts(dataset: Path, count: int | None, tokenizer: str | None) -> "list[Prompt]":
    from slipstream.bench.dataset import open_tokenizer, read_dataset

    samples = read_dataset(dataset, count)
    if tokenizer is None and any(isinstance(sample.prompt, str) for sample in samples):
        raise UsageError(f"{dataset} holds texts; give --tokenizer, such as the model's folder.")
    encode = None if tokenizer is None else open_tokenizer(tokenizer).encode
    return [
        (tuple(encode(each.prompt) if encode and isinstance(each.prompt, str) else map(int, each.prompt)),
         each.output_tokens)
        for each in samples
    ]  # fmt: skip


def _rows(outcome: "Outcome", num_replicas: int) -> list[tuple[str, str]]:
    run, num_steps = outcome.run, max(1, len(outcome.steps))

    def spread(values: "Spread") -> str:
        parts = values.percentiles
        return f"{parts[50] * 1e3:.1f} ms median, {parts[95] * 1e3:.1f} p95, {parts[99] * 1e3:.1f} p99"

    return [
        ("requests", f"{len(run.whole)} in {run.seconds:.2f} s"),
        ("throughput", f"{run.rate(lambda each: 1):.2f} requests/s, {run.output_rate:.1f} output tokens/s"),
        ("TTFT", spread(run.ttft)),
        ("TPOT", spread(run.tpot)),
        ("ITL", spread(run.itl)),
        ("latency", spread(run.latency)),
        ("prompt tokens found cached", f"{_share(run.whole):.0%}"),
        ("steps", f"{len(outcome.steps)}, of {sum(work.tokens for work in outcome.steps) / num_steps:.1f} tokens and "
                  f"{sum(work.sequences for work in outcome.steps) / num_steps:.1f} sequences on average"),
        ("busy", f"{outcome.busy_seconds / (num_replicas * run.seconds or 1):.0%} of the time"),
        ("preemptions", str(outcome.num_preemptions)),
    ]  # fmt: skip


def _share(timelines: "list[Timeline]") -> float:
    return sum(each.num_cached for each in timelines) / max(1, sum(each.num_input for each in timelines))
