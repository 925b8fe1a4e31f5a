"""slipstream tune: settings for a load, as a file for slipstream serve."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from slipstream.cli import _options as options
from slipstream.cli._tables import print_table
from slipstream.cli.bench import _offline
from slipstream.errors import UsageError
from slipstream.progress import progress_bar

if TYPE_CHECKING:
    from slipstream.api import LLM
    from slipstream.bench.dataset import Sample
    from slipstream.bench.tune import Contender, Found, Goal, Options

AS_IT_IS = "none"


def tune(
    model: Annotated[str, typer.Argument(help="Model folder, .gguf file, Hub id, smollm2, or engine folder.")],
    output: Annotated[Path, typer.Option(help="Write the settings to this YAML file, for serve --config.")],
    dataset: _offline.Dataset = None,
    num_requests: _offline.NumRequests = None,
    max_ttft_ms: Annotated[float | None, typer.Option(min=0.1, help="Longest wait for a first token.")] = None,
    max_tpot_ms: Annotated[float | None, typer.Option(min=0.01, help="Longest time per further token.")] = None,
    max_latency_ms: Annotated[float | None, typer.Option(min=0.1, help="Longest time of a whole answer.")] = None,
    quantization: Annotated[
        str, typer.Option(help="Formats to try, with commas, such as none,int8: they change what a model says.")
    ] = AS_IT_IS,
    kv_cache_dtype: Annotated[str, typer.Option(help="KV caches to try, with commas, such as auto,int8.")] = "auto",
    speculative: Annotated[
        str | None, typer.Option(help="Drafts to try beside n-grams, as JSON, such as a model that serve takes.")
    ] = None,
    concurrency: Annotated[
        int | None, typer.Option(min=1, help="Without limits: requests at a time.  [default: all at once]")
    ] = None,
    price_per_hour: Annotated[
        float | None, typer.Option(min=0, help="Of this machine: tells what a million output tokens cost.")
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Measurements of each contender, in turn.")] = 2,
    dtype: options.Dtype = "auto",
    device: options.Device = "auto",
    max_seq_len: options.MaxSeqLen = None,
    kv_cache_free_memory_fraction: options.KvCacheFraction = 0.9,
    plugin: options.Plugin = None,
) -> None:
    """Find an engine's best limits and formats for a load, on this machine.

    Without limits the goal is output tokens a second; with some it is requests a second of which 95 % keep them. Every
    format's steps are measured, batch sizes and token budgets are searched in simulation (slipstream simulate), and the
    best is measured beside the defaults, without and with drafts. Whatever is not better by more than noise stays.

    Example:
        slipstream tune path/to/folder --dataset synthetic.txt --output tuned.yaml --quantization none,int8
        slipstream tune smollm2 --dataset synthetic.txt --output tuned.yaml --max_ttft_ms 500 --max_tpot_ms 60
        slipstream tune smollm2 --dataset synthetic.txt --output tuned.yaml --concurrency 1
        slipstream serve smollm2 --config tuned.yaml
    """
    from slipstream.bench.dataset import read_dataset
    from slipstream.bench.load import Load
    from slipstream.bench.serving import Limits
    from slipstream.bench.tune import NGRAMS, Contender, Goal, measure, winner, with_drafts

    if dataset is None:
        raise UsageError("There is no --dataset; make one with slipstream bench prepare-dataset.")
    limits = Limits(max_ttft_ms, max_tpot_ms, max_latency_ms)
    if concurrency is not None and limits != Limits():
        raise UsageError(
            "--concurrency goes without limits, which are kept by a rate of requests; give one of the two."
        )
    goal = Goal(None if limits == Limits() else limits, Load(concurrency))
    engines = _Engines(
        model,
        {"dtype": dtype, "max_seq_len": max_seq_len},
        {"device": device, "kv_cache_free_memory_fraction": kv_cache_free_memory_fraction, "plugins": plugin or ()},
    )
    samples = read_dataset(dataset, num_requests)
    formats = [
        {name: value for name, value in {"quantization": weights, "kv_cache_dtype": cache}.items()
         if value not in (AS_IT_IS, "auto")}
        for weights in quantization.split(",") for cache in kv_cache_dtype.split(",")
    ]  # fmt: skip
    with progress_bar() as progress:
        searched = [_search(engines, chosen, samples, goal, progress) for chosen in formats]
    _print_searched(formats, searched, goal)
    best = max(range(len(formats)), key=lambda index: searched[index].score)
    found = searched[best]
    if not found.score:
        raise UsageError("No settings keep these limits, not even for one request at a time; raise them.")
    tuned = {**formats[best], **found.changes}
    contenders = [Contender("defaults", {}, [])]
    contenders += [Contender("tuned", tuned, [])] if tuned else []
    drafts = NGRAMS if speculative is None else NGRAMS | {"the drafts asked for": speculative}
    load = goal.load if goal.limits is None else Load(rate=found.score)
    with progress_bar() as progress:

        def measured(several: "Sequence[Contender]") -> "Contender":
            measure(several, engines.opened, samples, load, rounds, lambda name: progress(name, 0, 1))
            return winner(several, goal)

        plain = measured(contenders) if tuned else contenders[0]
        drafting = with_drafts(plain, drafts)
        measured([plain, *drafting])  # again, in turn with them
    contenders += drafting
    chosen = winner(contenders, goal)
    _print_measured(contenders, goal, load, price_per_hour)
    _write(output, model, chosen, contenders, goal, load)
    if chosen is contenders[0]:
        print(f"The defaults are as good as anything found; {output} says so and changes nothing.")
    else:
        print(f"{chosen.name}: written to {output}; next: slipstream serve {model} --config {output}")


class _Engines:
    """Of each format one, built when it is first opened; limits need no other."""

    def __init__(self, model: str, build: dict[str, Any], start: dict[str, Any]) -> None:
        from slipstream.build.cache import device_for

        self._model, self._build, self._start = model, build, start
        self.device = device_for(start["device"])
        self._paths: dict[tuple[object, object], Path] = {}

    @contextmanager
    def opened(self, chosen: "Options") -> "Iterator[LLM]":
        from slipstream.api import LLM

        formats = {name: chosen[name] for name in ("quantization", "kv_cache_dtype") if name in chosen}
        limits = {name: value for name, value in chosen.items() if name not in formats}
        key = formats.get("quantization"), formats.get("kv_cache_dtype")
        first = {} if key in self._paths else {**self._build, **formats}
        with LLM(self._paths.get(key, self._model), **self._start, **first, **limits) as llm:
            self._paths[key] = llm.engine_path
            yield llm


def _search(engines: _Engines, chosen: "Options", samples: "Sequence[Sample]", goal: "Goal", progress: Any) -> "Found":
    from slipstream.bench.calibrate import calibrate
    from slipstream.bench.offline import make_requests
    from slipstream.bench.tune import Search

    with engines.opened(chosen) as llm:
        runs_ahead = engines.device.type == "cuda"
        costs = calibrate(llm, runs_ahead, progress, max_sequences=goal.load.concurrency).costs
        prompts = [(each.prompt_token_ids, each.max_tokens) for each in make_requests(llm, samples)]
        config = llm.runtime_config
    progress("search", 0, 1)
    return Search(costs, prompts, goal, runs_ahead).best(config)


def _print_searched(formats: "Sequence[Options]", searched: "Sequence[Found]", goal: "Goal") -> None:
    rows = [
        (_described(chosen) or "as it is", f"{found.score_before:.2f}", f"{found.score:.2f}",
         str(found.config.max_batch_size), str(found.config.max_num_tokens))
        for chosen, found in zip(formats, searched, strict=True)
    ]  # fmt: skip
    columns = ("format", "with its own limits", "with the best", "max_batch_size", "max_num_tokens")
    print_table(f"Simulated: {goal.unit}", columns, rows)


def _print_measured(contenders: "Sequence[Contender]", goal: "Goal", load: object, price: float | None) -> None:
    columns = ["measured", "output tokens/s", "TTFT ms, median and p95", "TPOT ms, median and p95"]
    columns += [] if goal.limits is None else ["keep the limits"]
    columns += [] if price is None else ["price of 1M output tokens"]
    rows = []
    for contender in contenders:
        middle = contender.runs[len(contender.runs) // 2]
        row = [contender.name, f"{contender.output_rate:.1f}"]
        row += [f"{spread.percentiles[50] * 1e3:.1f}, {spread.percentiles[95] * 1e3:.1f}"
                for spread in (middle.ttft, middle.tpot)]  # fmt: skip
        row += [] if goal.limits is None else [f"{contender.share_kept(goal.limits):.0%}"]
        row += [] if price is None else [f"{price / 3600 / contender.output_rate * 1e6:.3g}"]
        rows.append(row)
    print_table(f"Measured, {load}", columns, rows)


def _described(chosen: "Options") -> str:
    return ", ".join(f"{name} {value}" for name, value in chosen.items())


def _write(
    output: Path, model: str, chosen: "Contender", contenders: "Sequence[Contender]", goal: "Goal", load: object
) -> None:
    import yaml

    what = "output tokens/s" if goal.limits is None else "share of requests within the limits"
    lines = [f"# slipstream tune {model}: {what}, measured with {load}"]
    lines += [f"#   {each.name}: {each.score(goal):.4g}  {_described(each.options)}" for each in contenders]
    text = "\n".join(lines) + "\n" + yaml.safe_dump(dict(chosen.options), sort_keys=False)
    try:
        output.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UsageError(f"--output {output} cannot be written ({error.strerror}); name another file.") from None
