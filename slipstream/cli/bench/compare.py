"""slipstream bench compare: servers and engines side by side, and whether one of them is faster."""

import re
import sys
from typing import TYPE_CHECKING, Annotated

import typer

from slipstream.cli import _options as options
from slipstream.cli.bench import _endpoint, _offline, _report
from slipstream.errors import UsageError
from slipstream.progress import progress_bar

if TYPE_CHECKING:
    from slipstream.bench.compare import Contestant, Duel
    from slipstream.bench.report import Table
    from slipstream.bench.timeline import Run


def compare(
    contestants: Annotated[
        list[str], typer.Argument(help="Two or more: a URL, a model or engine, transformers:MODEL; NAME=… names one.")
    ],
    rounds: Annotated[int, typer.Option(help="Turns of each; 6 at least, more find smaller differences.")] = 10,
    concurrency: Annotated[int, typer.Option(min=1, help="Requests at a time.")] = 1,
    num_requests: Annotated[
        int | None, typer.Option(min=1, help="Of each turn.  [default: 2 for each at a time, 4 at least]")
    ] = None,
    dataset: _endpoint.Dataset = None,
    input_output_len: _endpoint.InputOutputLen = "128,64",
    protocol: _endpoint.Protocol = "openai",
    model: _endpoint.ModelName = None,
    tokenizer: _endpoint.TokenizerName = None,
    api_key: _endpoint.ApiKey = None,
    extra_body: _endpoint.ExtraBody = None,
    timeout: _endpoint.Timeout = 600,
    dtype: options.Dtype = "auto",
    device: options.Device = "auto",
    random_seed: _endpoint.Seed = 0,
    json_file: _offline.Json = None,
    html: _report.Html = None,
    record: _report.Record = None,
) -> None:
    """Measure servers and engines in turns, and compare the first with each other one, round by round.

    In a round all get the same requests, which are new in each round. A ratio above 1 says that the first is faster,
    and a winner is named only where the 95 % interval of the ratio leaves 1 out. Models run in processes of their own.

    Example:
        slipstream bench compare ours=http://127.0.0.1:8000 llama.cpp=http://127.0.0.1:8080 --concurrency 8
        slipstream bench compare smollm2 transformers:smollm2 --input_output_len 128,32
    """
    from slipstream.bench.compare import LEAST_ROUNDS, duels_of, medians, run_rounds
    from slipstream.bench.serving import endless

    _report.check_record(record)
    if len(contestants) < 2:
        raise UsageError(f"There is nothing to compare {contestants[0]} with; give two contestants or more.")
    if rounds < LEAST_ROUNDS:
        raise UsageError(f"--rounds is {rounds}; with fewer than {LEAST_ROUNDS} nothing can be told from noise.")
    count = num_requests or max(4, 2 * concurrency)
    samples = _endpoint.samples_for(dataset, input_output_len, count * (rounds + 1), random_seed)
    if len(samples) < count * (rounds + 1):
        print(f"note: {len(samples)} requests are asked again; a prefix cache may know them.", file=sys.stderr)
    opened: list[Contestant] = []
    try:
        for each in contestants:
            name, _, what = each.partition("=") if re.match(r"[\w .-]+=", each) else (each, "", each)
            if "://" in what:
                from slipstream.bench.contestants import Server

                endpoint, _ = _endpoint.open_endpoint(what, protocol, model, tokenizer, api_key, extra_body, timeout)
                opened.append(Server(name, endpoint, concurrency))
            else:
                from slipstream.bench.contestants import Worker

                kind = "transformers" if what.startswith("transformers:") else "slipstream"
                given = {"model": what.removeprefix("transformers:"), "dtype": dtype, "device": device}
                opened.append(Worker(name, kind, concurrency, given))
        with progress_bar() as progress:
            runs = run_rounds(
                opened, endless(samples), num_rounds=rounds, num_requests=count,
                progress=lambda done, total: progress("generate", done, total),
            )  # fmt: skip
    finally:
        for one in opened:
            one.close()
    names = [one.name for one in opened]
    duels = duels_of(names, runs)
    from slipstream.bench.run_plots import rounds_of

    title = " beside ".join(names)
    _report.publish(title, _tables(names, runs, duels), rounds_of(names, runs), html, record)
    if json_file is not None:
        _offline.write_json(json_file, {
            "concurrency": concurrency, "requests_of_a_turn": count,
            "contestants": [{"name": name, "medians": medians(own), "rounds": [run.to_dict() for run in own]}
                            for name, own in zip(names, runs, strict=True)],
            "duels": [{"metric": duel.metric, "first": names[0], "other": duel.other, "ratio": duel.ratio.mean,
                       "low": duel.ratio.low, "high": duel.ratio.high, "verdict": duel.ratio.verdict,
                       "pairs": duel.pairs} for duel in duels],
        })  # fmt: skip


def _tables(names: "list[str]", runs: "list[list[Run]]", duels: "list[Duel]") -> "list[Table]":
    from slipstream.bench.compare import medians
    from slipstream.bench.report import Table

    rows = []
    for name, own in zip(names, runs, strict=True):
        values = medians(own)
        rates = [run.output_rate for run in own]
        spread = f"{min(rates):.1f} to {max(rates):.1f}"
        times = (f"{values[key] * 1e3:.1f}" for key in ("TTFT p50", "TPOT p50"))
        rows.append((name, f"{values['tokens/s']:.1f}", spread, *times))
    columns = ("median of the rounds", "tokens/s", "lowest to highest", "TTFT ms p50", "TPOT ms p50")
    title = f"{len(runs[0])} rounds of {len(runs[0][0].timelines)} requests, {runs[0][0].load}"
    verdicts = {"first": f"{names[0]} is faster", "within the noise": "no difference beyond the noise"}
    judged = [
        (duel.other, duel.metric, f"{duel.ratio.mean:.3f}", f"{duel.ratio.low:.3f} to {duel.ratio.high:.3f}",
         verdicts.get(duel.ratio.verdict, f"{duel.other} is faster")) for duel in duels
    ]  # fmt: skip
    how_many = ("as", "by", "ratio", "95 % interval", "verdict")
    return [Table(title, columns, rows), Table(f"{names[0]}: how many times as fast", how_many, judged)]
