"""slipstream train-drafter: what drafts for a model, learned from the model's own texts."""

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from slipstream.cli import _options as options
from slipstream.cli._prompts import Prompt, read_prompts
from slipstream.cli._tables import print_table
from slipstream.errors import UsageError
from slipstream.progress import progress_bar

if TYPE_CHECKING:
    from slipstream.api.llm import LLM
    from slipstream.distill.texts import PromptSource


def train_drafter(
    model: Annotated[str, typer.Option(help="Model folder, .gguf file, engine folder, Hub id or smollm2.")],
    output_dir: Annotated[Path, typer.Option(help="Folder to write; new, empty, or one that this command began.")],
    method: Annotated[
        str, typer.Option(help="What to train, as --speculative names it: medusa, redrafter, eagle or draft_model.")
    ] = "medusa",
    data: Annotated[
        Path | None,
        typer.Option(help="Prompts for the model to answer, a .txt or .jsonl file.  [default: it makes them too]"),
    ] = None,
    num_texts: Annotated[
        int | None, typer.Option(min=32, help="Answers to learn from.  [default: 1024, or all prompts of --data]")
    ] = None,
    max_output_len: Annotated[int, typer.Option(min=8, help="Tokens of an answer.")] = 256,
    temperature: Annotated[float, typer.Option(min=0.0, help="Of the answers. 0: what is likeliest.")] = 0.0,
    num_heads: Annotated[int | None, typer.Option(min=1, help="Of medusa: tokens ahead.  [default: 4]")] = None,
    num_layers: Annotated[
        int | None, typer.Option(min=1, help="Of each head, or of the draft model.  [default: 1, 2 or 3]")
    ] = None,
    draft_vocab_size: Annotated[
        int | None,
        typer.Option(min=16, help="Of heads: tokens that can be drafted, the most frequent.  [default: 8192]"),
    ] = None,
    num_epochs: Annotated[int, typer.Option(min=1, help="Times that each text is learned from.")] = 8,
    learning_rate: Annotated[float, typer.Option(help="Of Adam, at its highest.")] = 1e-3,
    batch_size: Annotated[int, typer.Option(min=1, help="Texts of a training step.")] = 16,
    dtype: options.Dtype = "auto",
    max_batch_size: options.MaxBatchSize = None,
    random_seed: Annotated[int, typer.Option("--random_seed", "--seed", help="Equal seeds give equal bytes.")] = 0,
    device: options.Device = "auto",
) -> None:
    """Train a drafter for a model: the model writes texts, and the drafter learns to say what the model says.

    A run that is interrupted goes on where it was when the same command is given again. The texts stay in the folder.

    Example:
        slipstream train-drafter --method medusa --model smollm2 --output_dir heads
        slipstream run --model smollm2 --speculative '{"method": "medusa", "model": "heads"}' --input_text "Once"
    """
    if not 0 < learning_rate < 1:
        raise UsageError(f"--learning_rate is {learning_rate}; it must be above 0 and below 1, such as 0.001.")
    from slipstream.distill.texts import TextSettings, own_prompts
    from slipstream.distill.train import Settings, train

    given = None if data is None else _given(data, num_texts)
    flags = {"num_heads": num_heads, "num_layers": num_layers, "draft_vocab_size": draft_vocab_size}
    texts = TextSettings(
        model=model, num_texts=num_texts or (len(given) if given else 1024), max_output_len=max_output_len,
        temperature=temperature, seed=random_seed,
        prompts=None if given is None else hashlib.sha256(repr(given).encode()).hexdigest(), dtype=dtype,
    )  # fmt: skip
    settings = Settings(
        method=method, options={name: value for name, value in flags.items() if value is not None},
        num_epochs=num_epochs, learning_rate=learning_rate, batch_size=batch_size, seed=random_seed,
    )  # fmt: skip
    with progress_bar() as progress:
        source = own_prompts(random_seed) if given is None else _source(given)
        result = train(
            output_dir, texts, source, settings, device=device, max_batch_size=max_batch_size, progress=progress
        )
    rows = [(str(place), f"{share:.1%}") for place, share in enumerate(result.acceptance, 1)]
    rows.append(("acceptance length", f"{result.acceptance_length:.2f}"))
    if result.losses:
        rows.append(("loss, first and last epoch", f"{result.losses[0]:.3f}, {result.losses[-1]:.3f}"))
    print_table(f"{output_dir}: {method}, of texts held out", ("draft", "accepted"), rows)


def _given(data: Path, num_texts: int | None) -> list[Prompt]:
    prompts = read_prompts(data)
    if len(prompts) < (num_texts or 32):
        raise UsageError(f"--data {data} holds {len(prompts)} prompts and {num_texts or 32} are needed; give more.")
    return prompts


def _source(given: list[Prompt]) -> "PromptSource":
    def take(llm: "LLM", first: int, count: int) -> list[list[int]]:
        return [_token_ids(llm, prompt) for prompt in given[first : first + count]]

    return take


def _token_ids(llm: "LLM", prompt: Prompt) -> list[int]:
    """A text is what a user says, where the model has a chat template; token ids are as they are."""
    if isinstance(prompt, str) and llm.request_maker.chat_template is not None:
        return llm.chat_prompt([{"role": "user", "content": prompt}])
    return list(llm.request_maker.encode(prompt))
