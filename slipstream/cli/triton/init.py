"""slipstream triton init: write a model repository."""

from pathlib import Path
from typing import Annotated

import typer


def init(
    model_repo: Annotated[Path, typer.Option(help="Folder to write the models into.")],
    engine_dir: Annotated[
        Path | None, typer.Option(help="Engine folder; with it all keys are filled in.  [default: none is]")
    ] = None,
    tokenizer_dir: Annotated[
        Path | None, typer.Option(help="Folder of the tokenizer, where it is not the engine's.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Write over models that are there.")] = False,
) -> None:
    """Write the models preprocessing, tensorrt_llm, postprocessing, ensemble and tensorrt_llm_bls.

    Without --engine_dir their config.pbtxt hold ${keys}, to be filled in with `slipstream triton fill-template`.

    Example:
        slipstream triton init --model_repo repository --engine_dir engines/smollm2
        slipstream triton launch --model_repo repository
    """
    from slipstream.errors import UsageError
    from slipstream.serve.triton.repository import values_for_engine, write_repository

    if tokenizer_dir is not None and engine_dir is None:
        raise UsageError("--tokenizer_dir is filled in beside --engine_dir; give that too, or use fill-template.")
    values = None if engine_dir is None else values_for_engine(engine_dir, tokenizer_dir)
    left = write_repository(model_repo, values, replace=force)
    to_fill = f"; to fill in: {', '.join(left)}" if left else ", ready to launch"
    print(f"Wrote {model_repo}{to_fill}.")
