"""slipstream convert: a model as it was published becomes a checkpoint."""

from pathlib import Path
from typing import Annotated

import typer

from slipstream.cli import _options as options
from slipstream.errors import UsageError
from slipstream.progress import progress_bar
from slipstream.schema.units import human_bytes


def convert(
    model_dir: Annotated[str, typer.Option(help="Hugging Face folder, .gguf file, Hub id or smollm2.")],
    output_dir: Annotated[str, typer.Option(help="Checkpoint folder to write; new, empty, or an older checkpoint.")],
    model_cls_file: options.ModelClsFile = None,
    model_cls_name: options.ModelClsName = "Model",
    dtype: Annotated[
        str, typer.Option(help="float32, bfloat16 or float16. auto: the one the model was published in.")
    ] = "auto",
    kv_cache_dtype: options.KvCacheDtype = "auto",
    output_format: Annotated[
        str,
        typer.Option(
            help="slipstream: a checkpoint. hf: a Hugging Face folder again; awq, compressed-tensors, fp8 or gptq: "
            "one with packed weights in that layout."
        ),
    ] = "slipstream",
) -> None:
    """Convert a model to a checkpoint: one dtype, our names, its tokenizer beside it.

    Example:
        slipstream convert --model_dir models/SmolLM2-135M-Instruct --output_dir checkpoints/smollm2 --dtype bfloat16
    """
    if not output_dir:
        raise UsageError("--output_dir is empty; give a folder, such as checkpoints/mine, or . for this one.")
    from slipstream.checkpoint import OwnModel, open_checkpoint, resolve
    from slipstream.checkpoint import convert as convert_model

    own = None if model_cls_file is None else OwnModel(model_cls_file, model_cls_name)

    with progress_bar() as progress:
        convert_model(
            model_dir, output_dir, dtype=dtype, kv_cache_dtype=kv_cache_dtype, output_format=output_format,
            own_model=own, progress=progress,
        )  # fmt: skip
    written = open_checkpoint(resolve(output_dir, own))
    folder = Path(output_dir) / "tokenizer" if output_format == "slipstream" else Path(output_dir)
    tokenizer = "with" if any(folder.glob("tokenizer*.*")) else "without"
    print(
        f"{output_dir}: {written.options['model_type']}, {len(written.recipes)} tensors, "
        f"{human_bytes(written.num_bytes)} in {written.dtype}, {tokenizer} tokenizer"
    )
    written.close()
