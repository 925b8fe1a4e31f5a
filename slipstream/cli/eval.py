"""slipstream eval: how far one model is from another, on the same texts; and how they do at tasks of lm-eval."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from slipstream.cli import _options as options
from slipstream.cli._tables import print_table
from slipstream.errors import UsageError
from slipstream.progress import progress_bar
from slipstream.quantize import HELD_OUT

if TYPE_CHECKING:
    import torch


def eval(
    model_dir: Annotated[str, typer.Option(help="Checkpoint or Hugging Face folder, .gguf file, Hub id or smollm2.")],
    reference_dir: Annotated[
        str | None, typer.Option(help="The model to compare it with, such as the one it was made of.")
    ] = None,
    eval_dataset: Annotated[
        Path | None,
        typer.Option(help="A .txt or .jsonl file of your own.  [default: English and code of Python's own]"),
    ] = None,
    eval_size: Annotated[int, typer.Option(min=1, help="Texts to compare them on.")] = HELD_OUT,
    max_seq_length: Annotated[int, typer.Option(min=8, help="Tokens of each of these texts.")] = 512,
    tasks: Annotated[
        str | None,
        typer.Option(help="Tasks of lm-eval, such as hellaswag,arc_easy; with a reference, both models do them."),
    ] = None,
    tasks_dir: Annotated[
        Path | None, typer.Option(help="Folder of task files of your own (lm-eval's YAML), instead of lm-eval's.")
    ] = None,
    num_fewshot: Annotated[
        int | None, typer.Option(min=0, help="Solved examples before each question.  [default: as the task says]")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Questions of each task.  [default: all]")] = None,
    apply_chat_template: Annotated[
        bool, typer.Option("--apply_chat_template", help="Ask in the form of the model's chats.")
    ] = False,
    random_seed: Annotated[int, typer.Option("--random_seed", "--seed", help="Chooses the texts.")] = 0,
    output_file: Annotated[Path | None, typer.Option(help="Write the numbers there, too, as JSON.")] = None,
    device: options.Device = "auto",
) -> None:
    """Compare two models on the same texts: perplexity, KL divergence, agreement, errors of layers.

    Both run in float32, a decoder block at a time; a quantized one rounds what its engines round. Tasks run in engines,
    as slipstream run would.

    Example:
        slipstream eval --model_dir checkpoints/smollm2-awq --reference_dir smollm2
        slipstream eval --model_dir checkpoints/smollm2-awq --tasks arc_easy --limit 100
    """
    if reference_dir is None and tasks is None:
        raise UsageError("Give --reference_dir, a model to compare with, or --tasks; neither was given.")
    of_tasks = {"tasks_dir": tasks_dir, "num_fewshot": num_fewshot, "limit": limit,
                "apply_chat_template": apply_chat_template or None}  # fmt: skip
    for name, value in of_tasks.items():
        if tasks is None and value is not None:
            raise UsageError(f"--{name} is about --tasks; give these, too, such as --tasks arc_easy.")
    from slipstream.build.cache import device_for
    from slipstream.quantize.report import quality_rows, size_row, write_json

    where = device_for(device)
    opened = None if tasks is None else _open_tasks(tasks, tasks_dir)
    found: dict[str, Any] = {"model": model_dir}
    if reference_dir is not None:
        found |= _compare(model_dir, reference_dir, eval_dataset, eval_size, max_seq_length, random_seed, where)
        rows = size_row(found), *quality_rows(found["quality"])
        print_table(f"{model_dir} beside {reference_dir}", (), rows)
    if opened is not None:
        models = [each for each in (model_dir, reference_dir) if each is not None]
        done = {each: _do_tasks(opened, each, device, num_fewshot, limit, apply_chat_template) for each in models}
        found |= dict(zip(("tasks", "reference_tasks"), (done[each] for each in models), strict=False))
        _print_tasks(done)
    if output_file is not None:
        write_json(output_file, found)


def _compare(
    model_dir: str, reference_dir: str, dataset: Path | None, size: int, length: int, seed: int, where: "torch.device"
) -> dict[str, Any]:
    from slipstream.checkpoint import open_checkpoint, resolve
    from slipstream.quantize.compare import compare
    from slipstream.quantize.texts import texts_for

    model, reference = (open_checkpoint(resolve(each)) for each in (model_dir, reference_dir))
    texts = texts_for(reference, dataset, num_calibration=0, num_held_out=size, length=length, seed=seed)
    with progress_bar() as progress:
        quality = compare(model, reference, texts.held_out, where, progress).summary()
    for each in (model, reference):
        each.close()
    return {"reference": reference_dir, "text": texts.digest, "bytes": model.num_bytes,
            "reference_bytes": reference.num_bytes, "quality": quality}  # fmt: skip


def _open_tasks(tasks: str, folder: Path | None) -> list[Any]:
    try:
        from slipstream.bench.lm_eval import open_tasks
    except ImportError as error:
        raise UsageError(f"--tasks needs {error.name}; install it with: pip install 'slipstream[eval]'.") from None
    return open_tasks([name.strip() for name in tasks.split(",")], folder)


def _do_tasks(
    opened: Sequence[Any], model: str, device: str, num_fewshot: int | None, limit: int | None, is_chat: bool
) -> dict[str, Any]:
    from slipstream.api.llm import LLM
    from slipstream.bench.lm_eval import evaluate_tasks

    with LLM(model, device=device) as llm:
        return evaluate_tasks(llm, opened, num_fewshot=num_fewshot, limit=limit, apply_chat_template=is_chat)


def _print_tasks(done: dict[str, dict[str, Any]]) -> None:
    """done: the results by the model's name, that in question first."""
    from slipstream.bench.lm_eval import metrics_of

    about, *_ = done.values()
    columns = [metrics_of(results) for results in done.values()]
    rows = [
        (task, about["n-shot"].get(task, ""), about["n-samples"].get(task, {}).get("effective", ""), metric,
         *(column[task, metric] for column in columns))
        for task, metric in columns[0]
    ]  # fmt: skip
    print_table("Tasks", ("task", "few-shot", "questions", "metric", *done), rows)
