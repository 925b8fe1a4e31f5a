"""What bench latency and bench throughput share: options, and a data set's requests in this process."""

import json
import random
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from slipstream.errors import UsageError
from slipstream.progress import progress_bar

if TYPE_CHECKING:
    from slipstream.cli.bench._engine import Measured

Model = Annotated[
    str | None,
    typer.Option(
        "--model", "-m",
        help="Model folder, .gguf file, Hub id, smollm2, or the name of a shape; beside --engine_dir its name alone.",
    ),
]  # fmt: skip
EngineDir = Annotated[Path | None, typer.Option(help="Engine folder to measure.")]
Dataset = Annotated[Path | None, typer.Option(help="Requests, as slipstream bench prepare-dataset makes them.")]
NumRequests = Annotated[int | None, typer.Option(min=1, help="Take so many of them.  [default: all]")]
Json = Annotated[
    Path | None, typer.Option("--json", "--report_json", help="Write the numbers to this file, too.")
]  # fmt: skip


def run_dataset(
    measured: "Measured", dataset: Path, num_requests: int | None, concurrency: int | None, warm_up: int, device: str,
    json_file: Path | None,
) -> None:  # fmt: skip
    from slipstream.bench import blocks
    from slipstream.bench.dataset import random_tokens, read_dataset
    from slipstream.bench.load import Load
    from slipstream.bench.offline import ask, make_requests
    from slipstream.build.cache import device_for
    from slipstream.build.tune import describe_device

    llm = measured.llm
    requests = make_requests(llm, read_dataset(dataset, num_requests))
    load = Load(concurrency)
    like = requests[:warm_up]  # in length; with tokens of their own, to leave nothing in the prefix cache
    vocabulary = range(llm.manifest.vocab_size)
    sizes = [[len(each.prompt_token_ids) for each in like], [each.max_tokens for each in like]]
    ask(llm, make_requests(llm, random_tokens(random.Random(0), vocabulary, *sizes)), load)
    with progress_bar() as progress:
        run = ask(llm, requests, load, progress)
    where = describe_device(device_for(device))
    print(blocks.text_of(run, llm, measured.name, measured.where, str(dataset), where))
    if json_file is not None:
        write_json(json_file, {"model": measured.name, "device": where, "dataset": str(dataset), **run.to_dict()})
    for timeline in run.timelines:
        if timeline.error is not None:
            raise UsageError(f"{run.num_failed} requests failed, such as one that ended with {timeline.error!r}.")


def write_json(path: Path, values: Any) -> None:
    try:
        path.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise UsageError(f"--json {path} cannot be written ({error.strerror}); name another file.") from None
