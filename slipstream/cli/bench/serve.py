"""slipstream bench serve: what clients of a server see, under one load after another."""

import random
import re
import sys
from typing import TYPE_CHECKING, Annotated

import typer

from slipstream.cli.bench import _endpoint, _offline, _report
from slipstream.errors import UsageError
from slipstream.progress import progress_bar

if TYPE_CHECKING:
    from slipstream.bench.load import Load
    from slipstream.bench.report import Table
    from slipstream.bench.serving import Measurement


def serve(
    url: Annotated[str, typer.Argument(help="The server, such as http://127.0.0.1:8000.")],
    protocol: _endpoint.Protocol = "openai",
    model: _endpoint.ModelName = None,
    concurrency: Annotated[
        str | None, typer.Option(help="Clients, each asking again when it has its answer; 1,8,64 is a sweep.")
    ] = None,
    request_rate: Annotated[
        str | None, typer.Option(help="Instead: requests a second that come by chance (Poisson); 1,2.5,5 is a sweep.")
    ] = None,
    dataset: _endpoint.Dataset = None,
    input_output_len: _endpoint.InputOutputLen = "128,64",
    num_requests: Annotated[
        int | None,
        typer.Option(min=1, help="Of each load.  [default: 4 a client, or those of 30 seconds; 32 at least]"),
    ] = None,
    warm_up: Annotated[
        int, typer.Option("--warm_up", "--warmup", min=0, help="Requests before the first load that are not counted.")
    ] = 4,
    goodput: Annotated[
        str | None, typer.Option(help="Count the answers that keep these limits in ms: ttft:500,tpot:50,latency:5000.")
    ] = None,
    tokenizer: _endpoint.TokenizerName = None,
    api_key: _endpoint.ApiKey = None,
    extra_body: _endpoint.ExtraBody = None,
    timeout: _endpoint.Timeout = 600,
    random_seed: _endpoint.Seed = 0,
    json_file: _offline.Json = None,
    html: _report.Html = None,
    record: _report.Record = None,
) -> None:
    """Measure any server that streams: TTFT, TPOT, ITL and latency of its answers, and its throughput.

    Answers are greedy and as long as asked for, end-of-sequence ignored where the protocol can say so. Times are taken
    where bytes reach this machine's sockets; how late the client itself was is printed beside them.

    Example:
        slipstream bench serve http://127.0.0.1:8000 --concurrency 1,8,64 --input_output_len 128,64
        slipstream bench serve http://127.0.0.1:8000 --request_rate 1,2,4 --html rates.html
    """
    loads = _loads(concurrency, request_rate)
    limits = _endpoint.parse_limits(goodput)
    _report.check_record(record)
    from slipstream.bench.load import Load
    from slipstream.bench.serving import endless

    counts = [num_requests or load.usual_requests() for load in loads]
    samples = _endpoint.samples_for(dataset, input_output_len, warm_up + sum(counts), random_seed)
    if len(samples) < warm_up + sum(counts):
        print(
            f"note: {len(samples)} requests are asked again and again; a prefix cache may know them.", file=sys.stderr
        )
    endpoint, name = _endpoint.open_endpoint(url, protocol, model, tokenizer, api_key, extra_body, timeout)
    draw, take = random.Random(random_seed), endless(samples)
    try:
        if warm_up:
            _check(endpoint.measure(take(warm_up), Load(concurrency=warm_up), draw=draw))
        found = []
        for load, count in zip(loads, counts, strict=True):
            with progress_bar() as progress:
                found.append(endpoint.measure(take(count), load, draw=draw, limits=limits, progress=progress))
            _check(found[-1])
    finally:
        endpoint.close()
    from slipstream.bench.run_plots import plots_of

    title = f"{name or protocol} at {url}"
    _report.publish(title, _tables(title, found), plots_of([each.run for each in found]), html, record)
    _print_notes(found)
    if json_file is not None:
        facts = {"url": url, "protocol": protocol, "model": name}
        _offline.write_json(json_file, facts | {"loads": [each.to_dict() for each in found]})


def _loads(concurrency: str | None, request_rate: str | None) -> "list[Load]":
    from slipstream.bench.load import Load

    if concurrency is not None and request_rate is not None:
        raise UsageError("--concurrency and --request_rate were both given; leave one of them out.")
    if request_rate is not None:
        rates = request_rate.split(",")
        if not all(re.fullmatch(r"\d+(\.\d+)?", rate) and float(rate) > 0 for rate in rates):
            raise UsageError(f"--request_rate is {request_rate!r}; it must be numbers above 0, such as 1,2.5.")
        return [Load(rate=float(rate)) for rate in rates]
    counts = (concurrency or "1").split(",")
    if not all(re.fullmatch(r"[1-9]\d{0,5}", count) for count in counts):
        raise UsageError(f"--concurrency is {concurrency!r}; it must be whole numbers from 1, such as 1,8,64.")
    return [Load(concurrency=int(count)) for count in counts]


def _check(found: "Measurement") -> None:
    """Raises UsageError where no answer came at all."""
    if not found.run.whole:
        raise UsageError(
            f"No answer came; the first request ended with {found.run.timelines[0].error}; see --protocol and "
            "--extra_body."
        )


def _tables(title: str, found: "list[Measurement]") -> "list[Table]":
    from slipstream.bench.report import Table

    columns = [
        "load", "requests", "failed", "tokens/s", "requests/s", "TTFT ms p50", "p99", "TPOT ms p50", "p99",
        "ITL ms p99", "latency ms p50", "p99",
    ]  # fmt: skip
    has_limits = any(each.limits is not None for each in found)
    tables = [Table(title, columns + ["good"] * has_limits, [_cells(each) for each in found])]
    uses = [(each.run.load, f"{each.gpu.memory_mib:.0f}", f"{each.gpu.watts:.0f}", f"{_per_joule(each):.2f}")
            for each in found if each.gpu is not None]  # fmt: skip
    if uses:
        columns = ["load", "memory MiB, most", "power W, mean", "tokens a joule"]
        tables.append(Table("GPUs of this machine", columns, uses))
    late = [
        (each.run.load, f"{each.read_lag.percentiles[50] * 1e3:.2f}", f"{each.read_lag.percentiles[99] * 1e3:.2f}",
         f"{each.ask_lag.percentiles[99] * 1e3:.2f}", f"{each.client_share:.0%}") for each in found
    ]  # fmt: skip
    columns = ["load", "read late, ms p50", "p99", "asked late, ms p99", "of a core"]
    return [*tables, Table("The client itself", columns, late)]


def _print_notes(found: "list[Measurement]") -> None:
    for each in found:
        if each.was_late:
            print(
                f"note: {each.run.load}: the client itself was late; where bytes could not be stamped as they came, "
                "times are its own.",
                file=sys.stderr,
            )
        if each.run.num_failed:
            why = next(timeline.error for timeline in each.run.timelines if not timeline.is_whole)
            print(f"note: {each.run.load}: {each.run.num_failed} failed, the first with {why}", file=sys.stderr)


def _cells(each: "Measurement") -> list[object]:
    run = each.run
    times = [
        f"{values.percentiles[part] * 1e3:.1f}"
        for values, parts in ((run.ttft, (50, 99)), (run.tpot, (50, 99)), (run.itl, (99,)), (run.latency, (50, 99)))
        for part in parts
    ]
    rates = f"{run.output_rate:.1f}", f"{run.rate(lambda timeline: 1):.2f}"
    good = [] if each.limits is None else [f"{each.num_good / len(run.timelines):.0%}"]
    return [run.load, len(run.timelines), run.num_failed, *rates, *times, *good]


def _per_joule(each: "Measurement") -> float:
    return each.run.output_rate / each.gpu.watts if each.gpu is not None and each.gpu.watts else 0.0
